"""Attention as mathematics, and what can be read out of it: nothing here knows a machine.

Whoever makes a function of TensorIR comes by here first, so this is where TVM's parser becomes the faster one.
"""

from schedules.definition import tvmscript

tvmscript.install()
