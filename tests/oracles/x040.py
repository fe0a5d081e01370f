"""RWKV-4 straight from the formulas: one token after the other, sums of exponentials as they stand, in the dtype of its weights.

Written independently of the package (it imports nothing of it) so that the two can be held against each other. Loss and optimizer: oracles/x070.py.
"""

import torch

from oracles.x070 import layer_norm, sub


def shares(p, name, x, x_prev):
    """The blend of a token with the one before it."""
    mix = p[f"time_mix_{name}"].flatten()
    return x * mix + x_prev * (1 - mix)


def time_mix(p, x, x_prev, seen):
    """One token of one sequence. x, x_prev: [C]; seen: the sums of exp(k) v and of exp(k), each decayed."""
    k = p["key.weight"] @ shares(p, "k", x, x_prev)
    v = p["value.weight"] @ shares(p, "v", x, x_prev)
    r = torch.sigmoid(p["receptance.weight"] @ shares(p, "r", x, x_prev))
    top, bottom = seen
    now = torch.exp(p["time_first"] + k)
    wkv = (top + now * v) / (bottom + now)
    decay = torch.exp(-torch.exp(p["time_decay"]))
    return p["output.weight"] @ (r * wkv), (decay * top + torch.exp(k) * v, decay * bottom + torch.exp(k))


def channel_mix(p, x, x_prev):
    k = torch.relu(p["key.weight"] @ shares(p, "k", x, x_prev)) ** 2
    return torch.sigmoid(p["receptance.weight"] @ shares(p, "r", x, x_prev)) * (p["value.weight"] @ k)


def logits(params, idx):
    """idx: [B, T]. Returns [B, T, V]."""
    n_layer = 1 + max(int(n.split(".")[1]) for n in params if n.startswith("blocks."))
    blocks = [(sub(params, f"blocks.{i}."), sub(params, f"blocks.{i}.att."), sub(params, f"blocks.{i}.ffn.")) for i in range(n_layer)]
    zero = params["emb.weight"].new_zeros(params["emb.weight"].shape[1])
    batch = []
    for tokens in idx.tolist():
        att_prev, ffn_prev, seen = [zero] * n_layer, [zero] * n_layer, [(zero, zero)] * n_layer
        rows = []
        for token in tokens:
            x = params["emb.weight"][token]
            for i, (block, att, ffn) in enumerate(blocks):
                if i == 0:
                    x = layer_norm(x, block["ln0.weight"], block["ln0.bias"])
                a = layer_norm(x, block["ln1.weight"], block["ln1.bias"])
                y, seen[i] = time_mix(att, a, att_prev[i], seen[i])
                att_prev[i] = a
                x = x + y
                f = layer_norm(x, block["ln2.weight"], block["ln2.bias"])
                x = x + channel_mix(ffn, f, ffn_prev[i])
                ffn_prev[i] = f
            rows.append(params["head.weight"] @ layer_norm(x, params["ln_out.weight"], params["ln_out.bias"]))
        batch.append(torch.stack(rows))
    return torch.stack(batch)
