"""Packs of precompiled modules: what a pack says of itself, and those that are found.

The packs of this package are folders beside these files, one an arch.
"""
