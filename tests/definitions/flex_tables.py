"""FlexAttention's functions for sequences of different lengths: what they read at a key or by distance are tables,
which are learnt."""

import torch

from schedules.definition.flex import from_flex

RELATIVE = torch.zeros(2, 41, requires_grad=True)
AT_KEYS = torch.zeros(300, requires_grad=True)


def placed(score, b, h, q_idx, kv_idx):
    return score + RELATIVE[h, (q_idx - kv_idx).clamp(-20, 20) + 20] * torch.tanh(AT_KEYS[kv_idx])


flex_tables = from_flex(placed, tables=True)
