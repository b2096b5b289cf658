"""What this machine is: its processor, its GPUs, and the C interface of tvm-ffi."""
