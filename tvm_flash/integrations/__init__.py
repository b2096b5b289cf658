"""tvm_flash inside other libraries, each of which is imported by the module that has its name."""
