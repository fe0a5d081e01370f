"""RWKV-7 with attention in some blocks, straight from the formulas: one token after the other, one head after the other, in the dtype of its weights.

Written independently of the package (it imports nothing of it) so that the two can be held against each other.
"""

import math

import torch

from oracles.x070 import channel_mix, layer_norm, sub, time_mix


def attention(p, x, x_prev, past, window):
    """One token of one sequence. x, x_prev: [C]; past: the keys and values of all tokens before it, a list of pairs [G, N]. Adds its own to past."""
    xq, xk, xv, xg = (x + (x_prev - x) * p[f"x_{c}"].flatten() for c in "qkvg")
    N = len(p["ln_q.weight"])
    q, k, v = ((p[f"{name}.weight"] @ y).split(N) for name, y in (("query", xq), ("key", xk), ("value", xv)))
    past.append(([layer_norm(head, p["ln_k.weight"], 0) for head in k], v))
    seen = past[-window:] if window else past
    out = []
    for h, head in enumerate(q):
        group = h * len(k) // len(q)
        head = layer_norm(head, p["ln_q.weight"], 0)
        weights = [torch.exp((head * keys[group]).sum() / math.sqrt(N)) for keys, _ in seen]
        out.append(sum(w * values[group] for w, (_, values) in zip(weights, seen)) / sum(weights))
    return p["output.weight"] @ (torch.cat(out) / (1 + torch.exp(-((xg @ p["g1"]) @ p["g2"]))))


def logits(params, idx, head_size, window=0):
    """idx: [B, T]. Returns [B, T, V]. Blocks that have a query matrix have attention."""
    n_layer = 1 + max(int(n.split(".")[1]) for n in params if n.startswith("blocks."))
    C = params["emb.weight"].shape[1]
    blocks = [(sub(params, f"blocks.{i}."), sub(params, f"blocks.{i}.att."), sub(params, f"blocks.{i}.ffn.")) for i in range(n_layer)]
    zero = params["emb.weight"].new_zeros
    batch = []
    for tokens in idx.tolist():
        att_prev, ffn_prev = [zero(C)] * n_layer, [zero(C)] * n_layer
        S = [[] if "query.weight" in att else [zero(head_size, head_size)] * (C // head_size) for _, att, _ in blocks]
        rows = []
        for token in tokens:
            x, v_first = params["emb.weight"][token], None
            for i, (block, att, ffn) in enumerate(blocks):
                if i == 0:
                    x = layer_norm(x, block["ln0.weight"], block["ln0.bias"])
                a = layer_norm(x, block["ln1.weight"], block["ln1.bias"])
                if "query.weight" in att:
                    y = attention(att, a, att_prev[i], S[i], window)
                else:
                    y, S[i], v_first = time_mix(att, a, att_prev[i], S[i], v_first, head_size)
                att_prev[i] = a
                x = x + y
                f = layer_norm(x, block["ln2.weight"], block["ln2.bias"])
                x = x + channel_mix(ffn, f, ffn_prev[i])
                ffn_prev[i] = f
            rows.append(params["head.weight"] @ layer_norm(x, params["ln_out.weight"], params["ln_out.bias"]))
        batch.append(torch.stack(rows))
    return torch.stack(batch)
