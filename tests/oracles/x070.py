"""RWKV-7 straight from the formulas: one token after the other, one head after the other, in the dtype of its weights.

Written independently of the package (it imports nothing of it) so that the two can be held against each other.
"""

import math

import torch


def layer_norm(x, weight, bias, eps=1e-5):
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(var + eps) * weight + bias


def time_mix(p, x, x_prev, S, v_first, head_size):
    """One token of one sequence. x, x_prev: [C]; S: list of H matrices [N, N], value rows and key columns; None at the beginning."""
    S = S or [x.new_zeros(head_size, head_size) for _ in range(len(x) // head_size)]
    xx = x_prev - x
    xr, xw, xk, xv, xa, xg = (x + xx * p[f"x_{c}"].flatten() for c in "rwkvag")
    r, k, v = p["receptance.weight"] @ xr, p["key.weight"] @ xk, p["value.weight"] @ xv
    w = p["w0"].flatten() + torch.tanh(xw @ p["w1"]) @ p["w2"]
    a = torch.sigmoid(p["a0"].flatten() + (xa @ p["a1"]) @ p["a2"])
    g = torch.sigmoid(xg @ p["g1"]) @ p["g2"]
    if v_first is None:
        v_first = v
    else:
        v = v + (v_first - v) * torch.sigmoid(p["v0"].flatten() + (xv @ p["v1"]) @ p["v2"])
    kk = k * p["k_k"].flatten()
    k = k * (1 + (a - 1) * p["k_a"].flatten())
    decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(w))

    out, S_new = [], []
    for h in range(len(S)):
        c = slice(h * head_size, (h + 1) * head_size)
        kkh = kk[c] / torch.clamp(torch.sqrt((kk[c] ** 2).sum()), min=1e-12)
        Sh = S[h] * decay[c] + torch.outer(S[h] @ -kkh, kkh * a[c]) + torch.outer(v[c], k[c])
        y = Sh @ r[c]
        y = (y - y.mean()) / torch.sqrt(((y - y.mean()) ** 2).mean() + 64e-5)
        y = y * p["ln_x.weight"][c] + p["ln_x.bias"][c]
        y = y + (r[c] * k[c] * p["r_k"][h]).sum() * v[c]
        out.append(y)
        S_new.append(Sh)
    return p["output.weight"] @ (torch.cat(out) * g), S_new, v_first


def channel_mix(p, x, x_prev):
    k = p["key.weight"] @ (x + (x_prev - x) * p["x_k"].flatten())
    return p["value.weight"] @ torch.relu(k) ** 2


def sub(params, prefix):
    return {n[len(prefix) :]: t for n, t in params.items() if n.startswith(prefix)}


def logits(params, idx, head_size, mix_time=time_mix, mix_channels=channel_mix):
    """idx: [B, T]. Returns [B, T, V]. mix_time, mix_channels: for models that differ there."""
    n_layer = 1 + max(int(n.split(".")[1]) for n in params if n.startswith("blocks."))
    C = params["emb.weight"].shape[1]
    blocks = [(sub(params, f"blocks.{i}."), sub(params, f"blocks.{i}.att."), sub(params, f"blocks.{i}.ffn.")) for i in range(n_layer)]
    zero = params["emb.weight"].new_zeros
    batch = []
    for tokens in idx.tolist():
        att_prev, ffn_prev, S, rows = [zero(C)] * n_layer, [zero(C)] * n_layer, [None] * n_layer, []
        for token in tokens:
            x, v_first = params["emb.weight"][token], None
            for i, (block, att, ffn) in enumerate(blocks):
                if i == 0:
                    x = layer_norm(x, block["ln0.weight"], block["ln0.bias"])
                a = layer_norm(x, block["ln1.weight"], block["ln1.bias"])
                y, S[i], v_first = mix_time(att, a, att_prev[i], S[i], v_first, head_size)
                att_prev[i] = a
                x = x + y
                f = layer_norm(x, block["ln2.weight"], block["ln2.bias"])
                x = x + mix_channels(ffn, f, ffn_prev[i])
                ffn_prev[i] = f
            rows.append(params["head.weight"] @ layer_norm(x, params["ln_out.weight"], params["ln_out.bias"]))
        batch.append(torch.stack(rows))
    return torch.stack(batch)


def loss_and_logit_gradient(z, targets):
    """Cross entropy, and the gradient of the logits with the official L2Wrap term added. z: [B, T, V]."""
    rows = z.shape[0] * z.shape[1]
    log_p = z - torch.logsumexp(z, -1, keepdim=True)
    loss = -log_p.gather(-1, targets[..., None]).mean()
    grad = torch.exp(log_p.detach())
    grad = grad - torch.nn.functional.one_hot(targets, z.shape[-1]).to(z.dtype)
    grad = grad / rows
    top, where = z.detach().max(-1, keepdim=True)
    return loss, grad + torch.zeros_like(grad).scatter(-1, where, 1e-4 / rows * top)


def adamw_step(params, grads, lr, weight_decay, decayed, doubled, beta1=0.9, beta2=0.99, eps=1e-18):
    """The first AdamW step from zero moments, bias correction included. decayed, doubled: predicates on names."""
    new = {}
    for name, p in params.items():
        g = grads[name]
        step = lr * (2.0 if doubled(name) else 1.0)
        m_hat = (1 - beta1) * g / (1 - beta1)
        v_hat = (1 - beta2) * g * g / (1 - beta2)
        p = p * (1 - step * weight_decay) if decayed(name) else p
        new[name] = p - step * m_hat / (torch.sqrt(v_hat) + eps)
    return new
