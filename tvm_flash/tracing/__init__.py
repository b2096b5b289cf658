"""Attention as a step of a program that torch or JAX traces."""
