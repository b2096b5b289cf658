"""NumPy alone: both layouts on strided arrays against float64; what this process has loaded and could load."""

import importlib.util
import json
import sys

import numpy as np

import tvm_flash
from tvm_flash import reference
from tvm_flash.call import fast

rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((2, 4, n, 64), dtype=np.float32) for n in (33, 70, 70))
want, want_lse = reference.attention(q, k, v, softmax_scale=0.125, mask=reference.causal)
for _ in range(3):  # the first time by the slow path
    out, lse = tvm_flash.flash_attention(q, k, v, causal=True, return_lse=True)
bshd = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)) for x in (q, k, v)]
out_v2 = tvm_flash.flash_attention_v2(*bshd, causal=True, variant="v2")
errors = (out - want, out_v2.transpose(0, 2, 1, 3) - want, lse - want_lse)
assert isinstance(out, np.ndarray)
print(
    json.dumps(
        {
            "error": max(float(abs(x).max()) for x in errors),
            "fast path": fast.is_loaded(),
            "installed": [name for name in ("tvm", "torch", "jax") if importlib.util.find_spec(name)],
            "loaded": sorted({name.partition(".")[0] for name in sys.modules}),
        }
    )
)
