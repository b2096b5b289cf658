"""``python -m tvm_flash``: a module for each command, and what they show."""
