// The machine itself, compiled once; each module is linked with a copy of it that has its own state.

#include <tvm/ffi/c_api.h>
#include <tvm/ffi/function.h>

#include "tma.h"
#include "wgmma.h"

namespace simt {

void refuse(const char* kind, const char* what, const char* why) {
  throw tvm::ffi::Error(kind, std::string(what) + why, "");
}
int raised() {
  TVM_FFI_SAFE_CALL_BEGIN();
  throw;
  TVM_FFI_SAFE_CALL_END();
}

}  // namespace simt

// What kernels' host halves ask of the library that launches them, and a function of the compiler's own library.
extern "C" int32_t opaque(int32_t value) { return value; }
extern "C" int32_t beyond_multiple(void* address, int32_t multiple) {
  return int32_t(uintptr_t(address) & uintptr_t(multiple - 1));
}
extern "C" float __nv_powf(float x, float n) { return powf(x, n); }
extern "C" int32_t multiprocessors() { return simt::settings.multiprocessors; }

// Called from Python: how the module's launches are to run from now on.
extern "C" TVM_FFI_DLL_EXPORT int32_t __tvm_ffi_simulate_with(void*, const TVMFFIAny* args, int32_t, TVMFFIAny* result) {
  simt::settings = {uint32_t(args[0].v_int64), int(args[1].v_int64), int(args[2].v_int64), args[3].v_int64 != 0};
  result->type_index = 0;
  return 0;
}
