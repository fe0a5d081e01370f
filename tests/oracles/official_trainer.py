"""RWKV-LM's own RWKV-7 trainer on a CPU: each CUDA operator that it loads is here as a formula, under the operator's own name.

Nothing of that repository (the trainer is its RWKV-v7/train_temp) is in this one. `prepared` copies its program to a folder
outside, `operators` puts the formulas where it looks for its kernels, and what is left, model, loss, groups, schedule, order
of samples, saving and logs, runs as it is written there. As a whole, with the Lightning that it is made for on the path:

    PYTHONPATH=FOLDER_OF_LIGHTNING_1_9_5 python tests/oracles/official_trainer.py SRC FOLDER --epoch_samples 64 -- --proj_dir out ...
"""

import argparse
import importlib
import json
import math
import os
import sys
import types
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch.nn import functional as F

OFFICIAL_MINI_EPOCH = "40320"
HEAD = 64


def shifted(x):
    """[B, T, C]: each token's predecessor, zeros before the first."""
    return F.pad(x, (0, 0, 1, -1))


def mix6(x, *shares):
    """In the tensors' own dtype, as the kernel's paired bf16 arithmetic is."""
    difference = shifted(x) - x
    return [x + difference * share for share in shares]


def channel_mix(x, share, key, value):
    mixed = x + (shifted(x) - x) * share
    return torch.relu(mixed @ key.T).square() @ value.T


def wide(formula):
    """Computed in fp32 where the tensors are bf16, rounded once at the end, as those kernels do."""

    def computed(*tensors):
        dtype = tensors[0].dtype
        out = formula(*(t.float() if t.dtype == torch.bfloat16 else t for t in tensors))
        return [x.to(dtype) for x in out] if isinstance(out, list) else out.to(dtype)

    return computed


@wide
def wkv7(r, w, k, v, a, b):
    """[B, T, H, N]; one token after the other."""
    heads = r.shape[2]
    decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(w))
    r, decay, k, v, a, b = (x.movedim(1, 0).flatten(1, 2) for x in (r, decay, k, v, a, b))  # [T, B * H, N]
    each = (decay[:, :, None], a[..., None], v[..., None], torch.stack((b, k), 2))
    state, states = r.new_zeros(*r.shape[1:], r.shape[2]), []
    for decayed, removing, value, written in zip(*(x.unbind() for x in each)):
        state = torch.baddbmm(state * decayed, torch.cat((state @ removing, value), 2), written)
        states.append(state)
    out = torch.stack(states) @ r[..., None]
    return out.view(*r.shape[:1], -1, heads, r.shape[2]).movedim(0, 1)


@wide
def keys(k, k_k, a, k_a):
    """[B, T, C] -> new keys, minus the normalised keys, these times a."""
    unit = F.normalize((k * k_k).unflatten(-1, (-1, HEAD)), dim=-1).flatten(-2)
    return [k * (1 + (a - 1) * k_a), -unit, unit * a]


@wide
def readout(x, r, k, v, r_k, weight, bias, g):
    normed = F.group_norm(x.flatten(0, 1), r_k.shape[0], weight, bias, 64e-5).view_as(x)
    bonus = ((r * k).unflatten(-1, (-1, HEAD)) * r_k).sum(-1, keepdim=True) * v.unflatten(-1, (-1, HEAD))
    return (normed + bonus.flatten(-2)) * g


@wide
def gate(a0, low_rank):
    return torch.sigmoid(a0 + low_rank)


@wide
def value_residual(v, v_first, v0, low_rank):
    return v + (v_first - v) * torch.sigmoid(v0 + low_rank)


def gradients(formula, inputs, outer):
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = formula(*inputs)
        return list(torch.autograd.grad(out, inputs, outer))


class Loss:
    """Cross entropy with L2Wrap, a kernel's two functions: logits [..., V] and targets -> loss; and its gradient."""

    @staticmethod
    def forward(logits, targets):
        rows = logits.flatten(0, -2)
        rows = rows.float() if rows.dtype == torch.bfloat16 else rows
        largest, at = rows.max(-1)
        return [F.cross_entropy(rows, targets.flatten()), torch.logsumexp(rows, -1), largest, at.int()]

    @staticmethod
    def backward(outer, logits, targets, lse, largest, at):
        rows = logits.flatten(0, -2).to(lse.dtype)
        gradient = torch.exp(rows - lse[:, None]) - F.one_hot(targets, rows.shape[1])
        gradient = gradient / len(rows) * outer
        gradient[torch.arange(len(rows)), at.long()] += largest * (outer * 1e-4 / len(rows))
        return gradient.to(logits.dtype).view_as(logits)


class Wkv4:
    """RWKV-4's kernel: w is minus the exponential of the parameter, k and v are [B, T, C].

    The gradient of w is asked for the parameter, one of each sequence.
    """

    @staticmethod
    def formula(w, u, k, v):
        """w: [B, C]. Sums of exponentials as they stand."""
        top = below = torch.zeros_like(w)
        out = []
        for key, value in zip(k.unbind(1), v.unbind(1)):
            now, kept = torch.exp(u + key), torch.exp(key)
            out.append((top + now * value) / (below + now))
            top, below = torch.exp(w) * top + kept * value, torch.exp(w) * below + kept
        return torch.stack(out, 1)

    @classmethod
    def forward(cls, B, T, C, w, u, k, v, y):
        y.copy_(cls.formula(w.expand(B, C), u, k, v))

    @classmethod
    def backward(cls, B, T, C, w, u, k, v, y, outer, *wanted):
        found = gradients(cls.formula, (w.expand(B, C), u.expand(B, C), k, v), outer)
        for out, gradient in zip(wanted, [found[0] * w, *found[1:]]):
            out.copy_(gradient)


# name: formula, inputs, outputs, what else the kernel keeps for its backward, whether the head size comes last
FORMULAS = {
    "rwkv7_cmix_bf16_v5": (channel_mix, 4, 1, 2, False),
    "rwkv7_tmix_mix6_bf16_v5": (mix6, 7, 6, 0, False),
    "rwkv7_tmix_kk_pre_bf16_v5": (keys, 4, 3, 1, True),
    "rwkv7_tmix_lnx_rkvres_xg_bf16_v1": (readout, 8, 1, 2, False),
    "rwkv7_tmix_a_gate_bf16": (gate, 2, 1, 0, False),
    "rwkv7_tmix_vres_gate_bf16_v3": (value_residual, 4, 1, 0, False),
}
RECURRENCES = ("rwkv7_clampw", "rwkv7_clampw_v3")
_libraries: dict[str, torch.library.Library] = {}


def _define(name, arguments, result, forward, backward_arguments, backward_result, backward):
    library = _libraries[name] = torch.library.Library(name, "DEF")
    library.define(f"forward({arguments}) -> {result}")
    library.define(f"backward({backward_arguments}) -> {backward_result}")
    library.impl("forward", forward, "CPU")
    library.impl("backward", backward, "CompositeImplicitAutograd")  # it differentiates inside


def _tensors(prefix, n, written=0):
    return ", ".join(f"Tensor{f'({chr(97 + i + written - n)}!)' if i >= n - written else ''} {prefix}{i}" for i in range(n))


def _define_formula(name):
    formula, n_in, n_out, kept, sized = FORMULAS[name]
    size = ", int head_size" if sized else ""

    def forward(*inputs):
        out = formula(*inputs[:n_in])
        many = out if isinstance(out, list) else [out]
        return many + [inputs[0].new_zeros(1)] * kept if n_out + kept > 1 else out

    def backward(*given):
        return gradients(formula, given[n_out : n_out + n_in], given[:n_out])

    backward_arguments = ", ".join(filter(None, (_tensors("g", n_out), _tensors("x", n_in), _tensors("kept", kept))))
    _define(
        name,
        _tensors("x", n_in) + size,
        "Tensor[]" if n_out + kept > 1 else "Tensor",
        forward,
        backward_arguments + size,
        "Tensor[]",
        backward,
    )


def _define_recurrence(name):
    def forward(*given):
        given[6].copy_(wkv7(*given[:6]))

    def backward(*given):
        for out, gradient in zip(given[9:], gradients(wkv7, given[:6], given[6:7])):
            out.copy_(gradient)

    _define(name, _tensors("x", 9, written=3), "()", forward, _tensors("x", 15, written=6), "()", backward)


def load(name, **sources):
    """In the place of torch.utils.cpp_extension.load."""
    if name == "rwkv7_l2wrap_ce_bf16_v2":
        return Loss
    if name.startswith("wkv_"):
        return Wkv4
    if name not in _libraries:
        _define_recurrence(name) if name in RECURRENCES else _define_formula(name)


def adamw(groups, lr, betas, eps, bias_correction=True, adam_w_mode=True, weight_decay=0.0, amsgrad=False):
    """In the place of DeepSpeed's FusedAdam."""
    assert bias_correction and not amsgrad and (adam_w_mode or weight_decay == 0)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


@contextmanager
def operators():
    """Within it the official program finds the formulas where it looks for its kernels. The environment is afterwards what it was."""
    with mock.patch.dict(os.environ, DS_ACCELERATOR="cpu"):
        import deepspeed.ops.adam
        import torch.utils.cpp_extension

        with mock.patch.object(torch.utils.cpp_extension, "load", load), mock.patch.object(deepspeed.ops.adam, "FusedAdam", adamw):
            yield


def prepared(src, folder, epoch_samples, any_dtype):
    """Copies the program (src: the folder `src` in it) to folder.

    The only words of it that change are the size of a mini-epoch and, for any_dtype, "bf16 only".
    """
    texts = {f"src/{name}.py": (Path(src) / f"{name}.py").read_text() for name in ("__init__", "binidx", "dataset", "model", "trainer")}
    texts["train.py"] = (Path(src).parent / "train.py").read_text()
    for name, there, here in (
        ("train.py", OFFICIAL_MINI_EPOCH, str(epoch_samples)),
        ("src/dataset.py", OFFICIAL_MINI_EPOCH, str(epoch_samples)),
        *([("src/model.py", "i.dtype==torch.bfloat16", "i.is_floating_point()")] if any_dtype else []),
    ):
        assert there in texts[name], (name, there)
        texts[name] = texts[name].replace(there, here)
    for name, text in texts.items():
        (path := Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def deepspeed_without_cuda():
    """Lightning 1.9.5's strategy asks for CUDA; DeepSpeed itself does not."""
    from pytorch_lightning.accelerators import CPUAccelerator
    from pytorch_lightning.strategies import deepspeed

    deepspeed.CUDAAccelerator = CPUAccelerator
    CPUAccelerator.get_parallel_devices = staticmethod(lambda devices: [torch.device("cpu", i) for i in range(devices)])
    # half a minute of compiling, for inference only
    importlib.import_module("deepspeed").ops.__compatible_ops__["deepspeed_shm_comm"] = False


def logging_to(path):
    """In the place of wandb, which is told loss, lr and wd of each step (--wandb x): lines of JSON, as in our metrics.jsonl."""
    file = open(path, "a", buffering=1)

    def log(told, step):
        print(
            json.dumps({"step": step, "tokens": round(told["Gtokens"] * 1e9), "loss": told["loss"], "lr": told["lr"], "wd": told["wd"]}),
            file=file,
        )

    return types.SimpleNamespace(init=lambda **settings: None, log=log)


def main():
    own = argparse.ArgumentParser()
    own.add_argument("src")
    own.add_argument("folder")
    own.add_argument("--epoch_samples", type=int, default=int(OFFICIAL_MINI_EPOCH))
    split = sys.argv.index("--")
    args, flags = own.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    args.folder += os.environ.get("LOCAL_RANK", "")  # under torchrun
    prepared(args.src, args.folder, args.epoch_samples, any_dtype="bf16" not in flags)
    sys.modules["wandb"] = logging_to(Path(args.folder) / "metrics.jsonl")
    os.chdir(args.folder)
    sys.path.insert(0, os.getcwd())
    sys.argv = ["train.py", *flags]
    with operators():
        if any(flag.startswith("deepspeed") for flag in flags):
            deepspeed_without_cuda()
        exec(compile(Path("train.py").read_text(), "train.py", "exec"), {"__name__": "__main__", "__file__": "train.py"})


if __name__ == "__main__":
    main()
