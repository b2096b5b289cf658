"""From a list of kernels to packs: what is asked for, what is missing, compiling, emitting, assembling, records."""
