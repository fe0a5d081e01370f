"""Models with ROSA straight from the formulas, in float64: every suffix compared, every bit flipped by running the sequence again.

Written independently of the package (it imports nothing of it) so that the two can be held against each other.
"""

import torch

from . import x070


def recalled(q, k, v):
    """Three lists of symbols -> one, of which element i recalls what followed the longest match; -1 where nothing matches.

    Element i: v[j + 1] for the j < i where q up to i matches k up to j longest, the latest such j.
    """
    found = []
    for i in range(len(q)):
        longest, where = 0, None
        for j in range(i):
            length = 0
            while length <= j and q[i - length] == k[j - length]:
                length += 1
            if length and length >= longest:
                longest, where = length, j
        found.append(-1 if where is None else v[where + 1])
    return found


def symbols(bits_on, M):
    """bits_on: [T][C] of 0 and 1. Returns for each group of M channels its symbols, the first channel the lowest bit."""
    return [[sum(row[g + m] << m for m in range(M)) for row in bits_on] for g in range(0, len(bits_on[0]), M)]


def layer(q, k, v, low, high, M, miss_is_low):
    """q, k, v: [T][C] of 0 and 1; low, high: C numbers. Returns [T][C] of numbers."""
    columns = [recalled(*rows) for rows in zip(symbols(q, M), symbols(k, M), symbols(v, M))]
    out = []
    for t in range(len(q)):
        row = []
        for c in range(len(q[0])):
            y = columns[c // M][t]
            if y < 0:
                row.append(low[c] if miss_is_low else 0.0)
            else:
                row.append(high[c] if y >> c % M & 1 else low[c])
        out.append(row)
    return out


class Recall(torch.autograd.Function):
    """One sequence, q, k, v [T, C], emb [C] -> [T, C].

    The gradient of a bit is what the output's weighted sum would gain by it, over twice its distance.
    """

    @staticmethod
    def forward(ctx, q, k, v, emb, M, tau):
        ctx.save_for_backward(q, k, v, emb)
        ctx.M, ctx.tau = M, tau
        bits_on = [(x > 0).long().tolist() for x in (q, k, v)]
        return torch.tensor(layer(*bits_on, (-emb).tolist(), emb.tolist(), M, M == 1), dtype=q.dtype)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, emb = ctx.saved_tensors
        bits_on = [(x > 0).long().tolist() for x in (q, k, v)]

        def phi():
            out = torch.tensor(layer(*bits_on, (-emb).tolist(), emb.tolist(), ctx.M, ctx.M == 1), dtype=q.dtype)
            return (out * grad).sum().item()

        grads = []
        for n, x in enumerate((q, k, v)):
            found = torch.zeros_like(x)
            for t in range(x.shape[0]):
                for c in range(x.shape[1]):
                    was, sums = bits_on[n][t][c], []
                    for bit in (0, 1):
                        bits_on[n][t][c] = bit
                        sums.append(phi())
                    bits_on[n][t][c] = was
                    found[t, c] = (sums[1] - sums[0]) / (2 * max(abs(x[t, c].item()), ctx.tau))
            grads.append(found)
        sign = torch.tensor(layer(*bits_on, [-1.0] * len(emb), [1.0] * len(emb), ctx.M, ctx.M == 1), dtype=q.dtype)
        return *grads, (grad * sign).sum(0), None, None


def shifted(x):
    return torch.cat([torch.zeros_like(x[:1]), x[:-1]])


def rosa_mix(p, x, M, tau):
    """x: [T, C]. Of their gradients q and k get half the sum, and a fiftieth of what each has beside it.

    A tenth goes on to what q, k and v are made of.
    """
    xx = shifted(x) - x
    mixed = (x + xx * p[f"x_{c}"].flatten() for c in "qkv")
    q, k, v = ((0.1 * m + 0.9 * m.detach()) @ p[f"{c}.weight"].T + p[f"{c}.bias"] for c, m in zip("qkv", mixed))
    towards_q, towards_k = 0.51 * q + 0.49 * k, 0.49 * q + 0.51 * k
    q, k = (towards + (x - towards).detach() for x, towards in ((q, towards_q), (k, towards_k)))
    return Recall.apply(q, k, v, p["rosa_qkv.emb"].flatten(), M, tau) @ p["o.weight"].T + p["o.bias"]


def logits(params, idx, head_size, M, tau):
    """idx: [B, T]. Returns [B, T, V]; time mixing and DeepEmbed where the parameters are there."""
    n_layer = 1 + max(int(n.split(".")[1]) for n in params if n.startswith("blocks."))
    batch = []
    for tokens in idx:
        x, v_first = params["emb.weight"][tokens], [None] * len(tokens)
        for i in range(n_layer):
            block, att, rosa, ffn = (x070.sub(params, f"blocks.{i}.{part}") for part in ("", "att.", "rosa.", "ffn."))
            norm = lambda name, x: x070.layer_norm(x, block[f"{name}.weight"], block[f"{name}.bias"])
            if "ln0.weight" in block:
                x = norm("ln0", x)
            branch = rosa_mix(rosa, norm("ln3", x), M, tau)
            if att:
                a = norm("ln1", x)
                S, rows = None, []
                for t in range(len(tokens)):
                    y, S, v_first[t] = x070.time_mix(
                        att, a[t], a[t - 1] if t else torch.zeros_like(a[0]), S, v_first[t] if i else None, head_size
                    )
                    rows.append(y)
                branch = branch + torch.stack(rows)
            x = x + branch
            f = norm("ln2", x)
            y = torch.stack([x070.channel_mix(ffn, now, before) for now, before in zip(f, shifted(f))])
            x = x + (y * ffn["enn.weight"][tokens] if "enn.weight" in ffn else y)
        batch.append(x070.layer_norm(x, params["ln_out.weight"], params["ln_out.bias"]) @ params["head.weight"].T)
    return torch.stack(batch)
