"""RWKV-4 straight from the formulas: one token after the other, sums of exponentials as they stand, in the dtype of its weights.

Written independently of the package (it imports nothing of it) so that the two can be held against each other. Loss and
optimizer: oracles/x070.py.
"""

import torch

from oracles import x070


def shares(p, name, x, x_prev):
    """The blend of a token with the one before it."""
    mix = p[f"time_mix_{name}"].flatten()
    return x * mix + x_prev * (1 - mix)


def time_mix(p, x, x_prev, seen, v_first, head_size):
    """One token of one sequence. x, x_prev: [C].

    seen: the sums of exp(k) v and of exp(k), each decayed; None at the beginning. The last two arguments are RWKV-7's.
    """
    k = p["key.weight"] @ shares(p, "k", x, x_prev)
    v = p["value.weight"] @ shares(p, "v", x, x_prev)
    r = torch.sigmoid(p["receptance.weight"] @ shares(p, "r", x, x_prev))
    top, bottom = seen or (torch.zeros_like(x), torch.zeros_like(x))
    now = torch.exp(p["time_first"] + k)
    wkv = (top + now * v) / (bottom + now)
    decay = torch.exp(-torch.exp(p["time_decay"]))
    return p["output.weight"] @ (r * wkv), (decay * top + torch.exp(k) * v, decay * bottom + torch.exp(k)), None


def channel_mix(p, x, x_prev):
    k = torch.relu(p["key.weight"] @ shares(p, "k", x, x_prev)) ** 2
    return torch.sigmoid(p["receptance.weight"] @ shares(p, "r", x, x_prev)) * (p["value.weight"] @ k)


def logits(params, idx):
    """idx: [B, T]. Returns [B, T, V]."""
    return x070.logits(params, idx, None, time_mix, channel_mix)
