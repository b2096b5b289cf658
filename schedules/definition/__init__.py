"""Attention as mathematics, and what can be read out of it: nothing here knows a machine."""
