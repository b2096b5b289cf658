"""JAX: a plain call and a compiled one, against float64."""

import json

import jax
import numpy as np

from tvm_flash import flash_attention, reference

given = [np.random.default_rng(i).standard_normal((2, 4, 33, 64), np.float32) for i in range(3)]
want, _ = reference.attention(*given, softmax_scale=0.125, mask=reference.causal)
arrays = [jax.device_put(x, jax.devices("cpu")[0]) for x in given]


def causal(q, k, v):
    return flash_attention(q, k, v, causal=True)


errors = [float(abs(np.asarray(f(*arrays)) - want).max()) for f in (causal, jax.jit(causal))]
print(json.dumps({"error": max(errors)}))
