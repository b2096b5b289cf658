"""A call, from its arguments to a launch."""
