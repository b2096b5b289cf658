/* Versions of glibc's symbols, the oldest there are.
 *
 * glibc 2.34 moved libpthread and libdl into libc and gave what they export new versions.  A library that is linked on
 * a newer system would ask for those; with their first versions, which remain, it also loads where glibc is older.
 */
#pragma once
#include <features.h>

#if defined(__x86_64__) && defined(__GLIBC__)
#define FIRST_VERSION(name) __asm__(".symver " #name ", " #name "@GLIBC_2.2.5")
FIRST_VERSION(dlopen);
FIRST_VERSION(dlsym);
FIRST_VERSION(pthread_create);
FIRST_VERSION(pthread_getspecific);
FIRST_VERSION(pthread_key_create);
FIRST_VERSION(pthread_mutex_trylock);
FIRST_VERSION(pthread_once);
FIRST_VERSION(pthread_setspecific);
#endif
