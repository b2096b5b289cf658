/* Versions of glibc's symbols, the oldest there are.
 *
 * glibc 2.34 moved libpthread and libdl into libc and gave what they export new versions.  A library that is linked on
 * a newer system would ask for those; with their first versions, which remain, it also loads where glibc is older.
 * glibc 2.38 has functions of its own for numbers in C23's syntax (__isoc23_sscanf and so on), which its headers put in
 * the place of the usual ones; the macro that asks for them is taken back.  Included before all other headers.
 */
#pragma once
#include <features.h>

#undef __GLIBC_USE_C2X_STRTOL
#define __GLIBC_USE_C2X_STRTOL 0 /* to 2.39 */
#undef __GLIBC_USE_C23_STRTOL
#define __GLIBC_USE_C23_STRTOL 0

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
