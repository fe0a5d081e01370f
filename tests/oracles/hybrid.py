"""RWKV-7 with attention in some blocks, straight from the formulas: token by token, head by head, in the dtype of its weights.

Written independently of the package (it imports nothing of it) so that the two can be held against each other.
"""

import math

import torch

from oracles import x070
from oracles.x070 import layer_norm


def attention(p, x, x_prev, past, N, window):
    """One token of one sequence. x, x_prev: [C].

    past: the keys and values of all tokens before it, a list of pairs [G, N]. Adds its own to past.
    """
    xq, xk, xv, xg = (x + (x_prev - x) * p[f"x_{c}"].flatten() for c in "qkvg")
    q, k, v = ((p[f"{name}.weight"] @ y).split(N) for name, y in (("query", xq), ("key", xk), ("value", xv)))
    past.append(([layer_norm(head, 1, 0) for head in k], v))
    seen = past[-window:] if window else past
    out = []
    for h, head in enumerate(q):
        group = h * len(k) // len(q)
        head = layer_norm(head, 1, 0) * p["scale"].flatten()[h * N : (h + 1) * N]
        weights = [torch.exp((head * keys[group]).sum() / math.sqrt(N)) for keys, _ in seen]
        out.append(sum(w * values[group] for w, (_, values) in zip(weights, seen)) / sum(weights))
    return p["output.weight"] @ (torch.cat(out) / (1 + torch.exp(-((xg @ p["g1"]) @ p["g2"]))))


def logits(params, idx, head_size, window=0):
    """idx: [B, T]. Returns [B, T, V]. Blocks that have a query matrix have attention."""

    def mix(p, x, x_prev, state, v_first, head_size):
        if "query.weight" not in p:
            return x070.time_mix(p, x, x_prev, state, v_first, head_size)
        past = state or []
        return attention(p, x, x_prev, past, head_size, window), past, v_first

    return x070.logits(params, idx, head_size, mix)
