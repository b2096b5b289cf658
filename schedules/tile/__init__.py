"""What the kernels of all GPU families share: fragments, masks and softmax on them, geometry, the way out."""
