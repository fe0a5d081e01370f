"""Kernels on a GPU: checked against float64, then timed. bench/gpu.sh calls it; the last line of its output is JSON.

    python bench/gpu_kernels.py wkv7 [--peer NAME=PATH] [--shape 8x4096x64x64]     forward, and with backward; B x T x H x N in bf16;
                                                                                   where the scans run in segments, without them too
    python bench/gpu_kernels.py norm_mix [--shape 16x512x12x64]                    or another elementwise operator: ours, plain, compiled
    python bench/gpu_kernels.py loss [--shape 16x512x12x64] [--vocabulary 65536]   the head with its loss: ours, plain PyTorch in chunks
    python bench/gpu_kernels.py adamw [--shape 16x512x12x64] [--layers 12]         the optimizer's step on a model; its gradients' norms
    python bench/gpu_kernels.py once                                               every kernel once on small shapes, for compute-sanitizer

Nothing is timed on wrong results: exit code 1. The inputs of a round are not those of the round before, unless they are
larger than the second-level cache anyway; all forms of a comparison take turns, each time between two events; the medians
count. The GPU is kept busy before the first of the two, until all is on its stream: what is timed is the GPU's time, not
Python's, which bench/gpu_step.py shows. --device cpu is a rehearsal of this file on the C++ kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

import rosa
from gpu_peers import Peer, load
from rwkvlm import models
from rwkvlm.config import ModelConfig, PhantomConfig
from rwkvlm.layers.ttt import StateTTT
from rwkvlm.ops import adamw, backend, fused
from rwkvlm.ops.adamw import plain as plain_adamw
from rwkvlm.ops.adamw import reference as exact_adamw
from rwkvlm.ops.cross_entropy import chunked, head_cross_entropy
from rwkvlm.ops.fused import reference
from rwkvlm.ops.wkv4 import wkv4, wkv4_chunked
from rwkvlm.ops.wkv7 import cuda as wkv7_kernels
from rwkvlm.ops.wkv7 import wkv7, wkv7_chunked

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}  # relative rms of an output or a gradient
PEER_LIMIT = 5e-2  # of others' kernels, which round where they like
KINDS = ("usual", "clamp", "repeated")
HEAD_LIMIT = 2e-2
AHEAD = 8_000_000  # cycles that the GPU waits before what is timed, about 4 ms: longer than Python takes for any of it
# over the tensor, forward and backward, each read and written once
PASSES = {"norm_mix": 18, "token_mix": 15, "time_mix_inputs": 27, "time_mix_output": 17, "relu_square": 5}
ONE_BLEND = "norm_mix of one blend"  # as before the channel mixing: other kernels than of six
RATES = dict(lr=3e-3, beta1=0.9, beta2=0.99, eps=1e-18, weight_decay=0.1)  # of AdamW
Work = Callable[[int], object]  # of the n-th set of inputs


class Wrong(Exception):
    """Results that are not right."""


def rms(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def demand(errors: dict[str, float], limit: float, what: str) -> float:
    """The worst of the errors; Wrong where one is above the limit, or no number."""
    name = max(errors, key=lambda n: errors[n] if errors[n] == errors[n] else float("inf"))
    if not errors[name] <= limit:
        raise Wrong(f"{what}: {name} is off by {errors[name]:.2e}, more than {limit:g}")
    return errors[name]


def timed(works: dict[str, Work], sets: int, options: argparse.Namespace, ahead: int = AHEAD) -> dict[str, dict]:
    """Milliseconds of each form: median, fastest, and how many rounds. ahead: cycles that the GPU waits first."""
    cuda = options.device == "cuda"
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(-options.warmup, options.rounds):
        for name, work in works.items():
            if cuda:
                torch.cuda.synchronize()
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda._sleep(ahead)
                begin.record()
                work(number % sets)
                end.record()
                torch.cuda.synchronize()
                ms = begin.elapsed_time(end)
            else:
                start = time.perf_counter()
                work(number % sets)
                ms = (time.perf_counter() - start) * 1e3
            if number >= 0:
                times[name].append(ms)
    return {name: {"ms": round(statistics.median(t), 4), "ms_fastest": round(min(t), 4), "rounds": len(t)} for name, t in times.items()}


def sets_of(size: int, options: argparse.Namespace) -> int:
    """How many sets of inputs of so many bytes lie beyond three times the second-level cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size if options.device == "cuda" else 1 << 20
    return min(16, max(1, -(-3 * cache // size)))


def copy_gb_s(options: argparse.Namespace) -> float:
    """Read and written, by a copy of much memory."""
    source = torch.ones((1 << 20) if options.small else (1 << 29), device=options.device)
    target = torch.empty_like(source)
    ms = timed({"copy": lambda i: target.copy_(source)}, 1, options)["copy"]["ms_fastest"]
    return round(8 * source.numel() / ms / 1e6, 1)


@contextlib.contextmanager
def in_segments(chunks: int) -> Iterator[None]:
    """Meanwhile the chunked CUDA scans run in segments of so many chunks, whatever the rule says; 0: not in segments."""
    wkv7_kernels.ask_for_segments(chunks)
    try:
        yield
    finally:
        wkv7_kernels.ask_for_segments(-1)


def recurrence_inputs(B: int, T: int, H: int, N: int, dtype: torch.dtype, device: str, kind: str = "usual", seed: int = 0) -> list[Tensor]:
    """r, w, k, v, a, b as a trained model makes them, and the gradient of y."""
    g = torch.Generator(device).manual_seed(seed)
    r, w, k, v, kk, rate, dy = (torch.randn(B, T, H, N, generator=g, device=device) for _ in range(7))
    rate = torch.sigmoid(rate)
    w = torch.full_like(w, 8.0) if kind == "clamp" else w * 2 - 1
    if kind == "repeated":
        kk, rate = kk[:, :1] + 0.03 * kk, 0.9 + 0.1 * rate
    kk = F.normalize(kk, dim=-1)
    return [x.to(dtype).contiguous() for x in (r / 2, w, k / 2, v, -kk, kk * rate, dy)]


def both(form: Callable, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    """y and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = form(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def expected(inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    return both(lambda *x: wkv7_chunked(*x)[0], [x.double() for x in inputs], dy.double())


NAMES = ("y", "dr", "dw", "dk", "dv", "da", "db")


def check_recurrence(form: Callable, options: argparse.Namespace, peer: Peer | None = None) -> dict[str, float]:
    """Worst error of each kind of input. A peer is asked for the usual inputs alone, and not for dw, which may be of another w."""
    found = {}
    T = 64 if options.small else 512
    for kind in ("usual",) if peer else KINDS:
        *inputs, dy = recurrence_inputs(2, T, 2, options.sizes[3], options.dtype, options.device, kind)
        want = expected(inputs, dy)
        got = both(peer.call, peer.prepare(*inputs), dy) if peer else both(form, inputs, dy)
        errors = {n: rms(g, w) for n, g, w in zip(NAMES, got, want) if not (peer and n == "dw")}
        found[kind] = demand(errors, PEER_LIMIT if peer else LIMITS[options.dtype], f"wkv7, {kind} inputs")
    return found


def check_documents(sizes: tuple[int, ...], options: argparse.Namespace) -> float:
    """Three documents in a row, of which the last has two chunks; r, k and v are read afterwards, and the kernel adds what that gives."""
    *inputs, dy = recurrence_inputs(*sizes, options.dtype, options.device)
    bounds = [0, 1, 5, sizes[1]]
    pieces = [expected([x[:, i:j].cpu() for x in inputs], dy[:, i:j].cpu()) for i, j in itertools.pairwise(bounds)]
    want = dict(zip(NAMES, (torch.cat(parts, 1) for parts in zip(*pieces))))
    want |= {name: want[name] + dy.cpu() for name in ("dr", "dk", "dv")}
    leaves = [x.detach().requires_grad_() for x in inputs]
    y, *passed = wkv7(*leaves, cu_seqlens=torch.tensor(bounds, device=options.device), pass_on=True)
    got = [y.detach(), *torch.autograd.grad([y, *passed], leaves, [dy] * 4)]
    return demand({name: rms(x.cpu(), want[name]) for name, x in zip(NAMES, got)}, LIMITS[options.dtype], "wkv7, documents")


def check_wkv4(sizes: tuple[int, ...], options: argparse.Namespace) -> float:
    """RWKV-4's recurrence, which bench/wkv4.py times."""
    B, T, H, N = sizes
    g = torch.Generator().manual_seed(0)
    w, u, k, v, dy = (torch.randn(shape, generator=g) for shape in ((H * N,), (H * N,), *[(B, T, H * N)] * 3))
    k, v, dy = (x.to(options.dtype) for x in (k, v, dy))
    want = both(lambda w, *x: wkv4_chunked(-torch.exp(w), *x)[0], [x.double() for x in (w, u, k, v)], dy.double())
    got = both(wkv4, [x.to(options.device) for x in (w, u, k, v)], dy.to(options.device))
    errors = {n: rms(g.cpu(), x) for n, g, x in zip(("y", "dw", "du", "dk", "dv"), got, want) if x.norm() > 1e-12}
    return demand(errors, LIMITS[options.dtype], "wkv4")


def measure_recurrence(options: argparse.Namespace) -> dict:
    B, T, H, N = options.sizes
    peer = load(options.peer) if options.peer else None
    name = options.peer.split("=")[0] if peer else ""
    row = {"shape": dict(zip("BTHN", options.sizes)), "dtype": str(options.dtype), "errors": {"ours": check_recurrence(wkv7, options)}}
    if peer:
        row["errors"][name] = check_recurrence(peer.call, options, peer)
    sets = [recurrence_inputs(B, T, H, N, options.dtype, options.device, seed=s) for s in range(sets_of(7 * B * T * H * N * 2, options))]
    part = [x[-1:, :, :2].contiguous() for x in sets[0]]  # of the full shape, the last row's first two heads
    *whole, dy = sets[0]
    want = expected(part[:-1], part[-1])
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count if options.device == "cuda" else 0
    segment = wkv7_kernels.segment_chunks(B, T, H, N, multiprocessors)
    row["segment_chunks"] = segment
    scans = {"ours": segment, "ours, not in segments": 0} if segment else {"ours": 0}
    for form, chunks in scans.items():
        with in_segments(chunks):
            errors = {n: rms(g[-1:, :, :2], w) for n, g, w in zip(NAMES, both(wkv7, whole, dy), want)}
        row["errors"][f"{form}, full shape"] = demand(errors, LIMITS[options.dtype], f"{form} at the full shape")

    leaves = [[x.detach().requires_grad_() for x in s[:-1]] for s in sets]
    works: dict[str, Work] = {}

    def add(form: str, call: Callable, inputs: list[list[Tensor]], chunks: int = 0) -> None:
        def forward(i: int) -> None:
            with torch.no_grad(), in_segments(chunks):
                call(*inputs[i])

        def step(i: int) -> None:
            with in_segments(chunks):
                torch.autograd.grad(call(*inputs[i]), inputs[i], sets[i][-1])

        works[f"{form}, forward"], works[form] = forward, step

    for form, chunks in scans.items():
        add(form, wkv7, leaves, chunks)
    if peer:
        add(name, peer.call, [[x.detach().requires_grad_() for x in peer.prepare(*s[:-1])] for s in sets])
    row["times"] = timed(works, len(sets), options)
    row["copy_gb_s"] = copy_gb_s(options)
    row["floor_ms"] = round(20 * B * T * H * N * 2 / row["copy_gb_s"] / 1e6, 3)  # 7 tensors forward, 13 backward, once each
    if peer:
        row["ours_is_faster_by"] = round(row["times"][name]["ms"] / row["times"]["ours"]["ms"], 2)
    return row


def elementwise_inputs(name: str, sizes: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
    B, T, H, N = sizes
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, shift: float = 0.0) -> Tensor:
        return (torch.randn(*shape, generator=g, device=device) + shift).to(dtype).requires_grad_()

    C = H * N
    if name in ("norm_mix", ONE_BLEND):
        blends = 1 if name == ONE_BLEND else 6
        return [normal(B, T, C), normal(B, T, C), normal(C, shift=1), normal(C), *(normal(1, 1, C) for _ in range(blends))]
    if name == "token_mix":
        return [normal(B, T, C), *(normal(1, 1, C) for _ in range(6))]
    if name == "time_mix_inputs":
        return [*(normal(B, T, C) for _ in range(6)), *(normal(1, 1, C, shift=shift) for shift in (0, 1, 1, 0, 0))]
    if name == "time_mix_output":
        return [*(normal(B, T, C) for _ in range(5)), normal(C, shift=1), normal(C), normal(H, N)]
    return [normal(B, T, 4 * C)]


def elementwise_call(name: str, module, sizes: tuple[int, ...]) -> Callable[..., list[Tensor]]:
    if name in ("norm_mix", ONE_BLEND):

        def call(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, *mixes: Tensor) -> list[Tensor]:
            stream, newest, mixed = module.norm_mix(x, branch, weight, bias, 1e-5, None, list(mixes), None)
            return [stream, *mixed]

        return call
    if name == "token_mix":
        return lambda x, *mixes: module.token_mix(x, None, list(mixes))
    if name == "time_mix_inputs":
        return lambda *inputs: list(module.time_mix_inputs(*inputs, sizes[3]))
    if name == "time_mix_output":
        return lambda *inputs: [module.time_mix_output(*inputs, 64e-5)]
    return lambda x: [module.relu_square(x)]


def slopes_of(outputs: list[Tensor]) -> list[Tensor]:
    g = torch.Generator(outputs[0].device).manual_seed(9)
    return [torch.randn(o.shape, generator=g, device=o.device).to(torch.bfloat16).to(o.dtype) for o in outputs]


def check_elementwise(name: str, options: argparse.Namespace) -> float:
    sizes = (2, 67, *options.sizes[2:])
    inputs = elementwise_inputs(name, sizes, options.dtype, options.device)
    outputs = elementwise_call(name, fused, sizes)(*inputs)
    slopes = slopes_of(outputs)
    got = [*outputs, *torch.autograd.grad(outputs, inputs, slopes)]
    leaves = [x.detach().cpu().double().requires_grad_() for x in inputs]  # on the CPU, so that a sanitizer looks at no reduction of others
    outputs = elementwise_call(name, reference, sizes)(*leaves)
    want = [*outputs, *torch.autograd.grad(outputs, leaves, [x.cpu().double() for x in slopes])]
    in_parts = name in ("norm_mix", ONE_BLEND) and options.device == "cpu"  # there, what is normalised is rounded too
    errors = {f"result {i}": rms(a.detach().cpu(), b.detach()) for i, (a, b) in enumerate(zip(got, want))}
    return demand(errors, (2 if in_parts else 1) * LIMITS[options.dtype], name)


def measure_elementwise(name: str, options: argparse.Namespace) -> dict:
    B, T, H, N = options.sizes
    row = {"shape": dict(zip("BTHN", options.sizes)), "dtype": str(options.dtype), "error": check_elementwise(name, options)}
    size = PASSES[name] * B * T * H * N * (4 if name == "relu_square" else 1) * options.dtype.itemsize
    sets = [elementwise_inputs(name, options.sizes, options.dtype, options.device, s) for s in range(sets_of(size, options))]
    forms = {"ours": elementwise_call(name, fused, options.sizes), "plain": elementwise_call(name, reference, options.sizes)}
    forms["compiled"] = torch.compile(forms["plain"], backend="inductor" if options.device == "cuda" else "aot_eager")
    slopes = [slopes_of(forms["plain"](*s)) for s in sets]
    works: dict[str, Work] = {}
    for form, call in forms.items():
        works[form] = lambda i, call=call: torch.autograd.grad(call(*sets[i]), sets[i], slopes[i])
    try:
        works["compiled"](0)
    except Exception as error:  # no compiler for it here, say; the others are timed all the same
        del works["compiled"]
        row["not_compiled"] = repr(error)[:300]
    row["times"] = timed(works, len(sets), options)
    row["copy_gb_s"], row["gb_s"] = copy_gb_s(options), round(size / row["times"]["ours"]["ms"] / 1e6, 1)  # of what must be moved at least
    return row


def measure_loss(options: argparse.Namespace) -> dict:
    B, T, H, N = options.sizes
    C, V = H * N, options.vocabulary

    def make(rows: int, V: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator(options.device).manual_seed(seed)
        x = torch.randn(rows, C, generator=g, device=options.device).to(options.dtype).requires_grad_()
        weight = (torch.randn(V, C, generator=g, device=options.device) * (2 / C**0.5)).to(options.dtype).requires_grad_()
        return x, weight, torch.randint(V, (rows,), generator=g, device=options.device)

    def ours(x: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
        loss = head_cross_entropy(x, weight, targets)
        return [loss, *torch.autograd.grad(loss, (x, weight))]

    def plain(x: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor | None]:
        with torch.no_grad():
            return list(chunked.loss_and_grads(x, weight, targets, 0, 1e-4, True, True))

    x, weight, targets = make(300, 5001)
    want = plain(x.detach().double(), weight.detach().double(), targets)
    errors = {n: rms(a.detach(), b) for n, a, b in zip(("loss", "dx", "dweight"), ours(x, weight, targets), want)}
    row = {"tokens": B * T, "C": C, "V": V, "dtype": str(options.dtype), "error": demand(errors, HEAD_LIMIT, "loss")}
    case = make(B * T, V)
    row["times"] = timed({"ours": lambda i: ours(*case), "plain": lambda i: plain(*case)}, 1, options)
    if options.device == "cuda":
        logits, losses = torch.randn(B * T, V, device="cuda").to(options.dtype), torch.empty(B * T, device="cuda")
        work = {"kernel alone": lambda i: torch.ops.rwkvlm.loss_of_logits(logits, case[2], losses, 1 / (B * T), 1e-4 / (B * T), True)}
        row["times"] |= timed(work, 1, options)
        row["kernel_gb_s_of_two_passes"] = round(2 * logits.numel() * logits.element_size() / row["times"]["kernel alone"]["ms"] / 1e6, 1)
    return row | {"gemm_tflops_of_ours": round(6 * B * T * C * V / row["times"]["ours"]["ms"] / 1e9, 2)}


def check_logits(V: int, options: argparse.Namespace) -> float:
    """The kernel of the loss alone; where there is none, on the CPU, the head."""
    if options.device == "cpu":
        options.sizes, options.vocabulary, options.rounds, options.warmup = (1, 20, 1, 32), V, 1, 0
        return measure_loss(options)["error"]
    # registers it
    head_cross_entropy(
        torch.zeros(1, 16, device="cuda"), torch.zeros(2, 16, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    )
    logits, targets = torch.randn(3, V).to(options.dtype), torch.tensor([0, V - 1, V // 2])
    losses, result = torch.empty(3, device="cuda"), logits.cuda()
    torch.ops.rwkvlm.loss_of_logits(result, targets.cuda(), losses, 1.0, 0.0, True)
    leaf = logits.double().requires_grad_()
    want = F.cross_entropy(leaf, targets, reduction="none")
    errors = {"loss": rms(losses.cpu(), want.detach()), "gradient": rms(result.cpu(), torch.autograd.grad(want.sum(), leaf)[0])}
    return demand(errors, LIMITS[options.dtype], f"loss of {V} logits")


def check_steps(sizes: tuple[int, ...], options: argparse.Namespace) -> float:
    """Test-time training of the state, all segments at once where a kernel can, against segment by segment in float64.

    The head is weak: where a unit comes out on the other side of zero, gradients jump.
    """
    _, _, H, N = sizes
    ttt = StateTTT(PhantomConfig(n_layer=1, n_embd=H * N, head_size=N, vocab_size=8))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p, scale in ((ttt.rate, 1.0), (ttt.w1, 0.5), (ttt.w2, 0.02)):
            p.copy_(scale * torch.randn(p.shape, generator=g))
    *inputs, dy = recurrence_inputs(*sizes, options.dtype, options.device)
    results = []
    for device, of_inputs, of_module in ((options.device, options.dtype, torch.float32), ("cpu", torch.float64, torch.float64)):
        ttt, leaves = ttt.to(device, of_module), [x.detach().to(device, of_inputs).requires_grad_() for x in inputs]
        with backend.asked_for("torch" if of_inputs == torch.float64 else ""):
            y = ttt(*leaves)
        results.append(
            [y.detach().cpu(), *(x.cpu() for x in torch.autograd.grad(y, [*leaves, *ttt.parameters()], dy.to(device, of_inputs)))]
        )
    names = ("y", *(f"d{n}" for n in "rwkvab"), "d_rate", "d_w1", "d_w2")
    return demand({name: rms(got, want) for name, got, want in zip(names, *results)}, 2 * LIMITS[options.dtype], "test-time training")


def optimizer_state(shapes: list[torch.Size], grad_dtype: torch.dtype, device: str) -> list[list[Tensor]]:
    """Masters, rounded, gradients, moments and steps after seven of them."""
    g = torch.Generator(device).manual_seed(0)
    masters, grads, averages, squares = ([torch.randn(shape, generator=g, device=device) for shape in shapes] for _ in range(4))
    squares, steps = [x.square_() for x in squares], [torch.tensor(7.0, device=device) for _ in shapes]
    return [masters, [p.bfloat16() for p in masters], [x.to(grad_dtype) for x in grads], averages, squares, steps]


def check_adamw(grad_dtype: torch.dtype, options: argparse.Namespace) -> float:
    """On sizes around the tiles of the kernel, one gradient at an odd address."""
    state = optimizer_state([torch.Size([n]) for n in (1, 3, 767, 2048, 8193, 100003)], grad_dtype, "cpu")
    exact = [[x.double() for x in tensors] for tensors in state]
    exact_adamw.adamw_(exact[0], [], *exact[2:], 0.3, None, **RATES)
    ours = [[x.to(options.device) for x in tensors] for tensors in state]
    ours[2][-1] = torch.cat([ours[2][-1][:1], ours[2][-1]])[1:]
    norms = adamw.gradient_norms(ours[2])
    adamw.adamw_(*ours, torch.tensor(0.3, device=options.device), torch.tensor(0.0, device=options.device), **RATES)
    errors = {"norms": rms(norms.cpu(), exact_adamw.gradient_norms(state[2]))}
    for name, i in (("masters", 0), ("exp_avgs", 3), ("exp_avg_sqs", 4), ("steps", 5)):
        errors[name] = max(rms(a.cpu(), b) for a, b in zip(ours[i], exact[i]))
    errors["rounded"] = max(rms(a.cpu(), b.cpu().bfloat16().double()) for a, b in zip(ours[1], ours[0]))
    return demand(errors, LIMITS[torch.float32], "adamw")


def measure_adamw(options: argparse.Namespace) -> dict:
    B, T, H, N = options.sizes
    with torch.device("meta"):
        model = models.build(ModelConfig(n_layer=options.layers, n_embd=H * N, head_size=N, vocab_size=options.vocabulary))
    shapes = [p.shape for p in model.parameters()]
    P = sum(shape.numel() for shape in shapes)
    row = {"layers": options.layers, "C": H * N, "V": options.vocabulary, "tensors": len(shapes), "parameters": P}
    row["error"] = max(check_adamw(dtype, options) for dtype in (torch.float32, torch.bfloat16))
    state = optimizer_state(shapes, options.dtype, options.device)
    wide = [*state[:1], [], [g.float() for g in state[2]], *state[3:]]
    scale, found = torch.tensor(0.5, device=options.device), torch.tensor(0.0, device=options.device)
    works: dict[str, Work] = {
        "ours": lambda i: adamw.adamw_(*state, scale, found, **RATES),
        "plain": lambda i: plain_adamw.adamw_(*state, scale, found, **RATES),
        "torch's fused step alone, of fp32": lambda i: plain_adamw.adamw_(*wide, None, found, **RATES),
        "ours, norms": lambda i: adamw.gradient_norms(state[2]),
        "plain, norms": lambda i: plain_adamw.gradient_norms(state[2]),
    }
    row["times"] = timed(works, 1, options, 10 * AHEAD)  # plain PyTorch starts thousands of kernels
    begin = time.perf_counter()
    works["ours"](0)
    row["ms_of_python"] = round((time.perf_counter() - begin) * 1e3, 3)  # until all is on the stream; on a CPU the step itself
    row["copy_gb_s"] = copy_gb_s(options)
    row["gb_s"], row["norms_gb_s"] = (
        round(size * P / row["times"][name]["ms"] / 1e6, 1) for name, size in (("ours", 28), ("ours, norms", 2))
    )
    return row


def once(options: argparse.Namespace) -> dict:
    """Every kernel, forward and backward, on small shapes, and right; but ROSA's gradient beyond shared memory (25,000 symbols: hours)."""
    found: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        options.dtype = dtype
        for sizes in ((1, 1, 3, 64), (2, 81, 1, 16), (1, 70, 1, 64), (1, 97, 2, 32), (1, 39, 1, 128)):
            options.sizes = sizes
            *inputs, dy = recurrence_inputs(*sizes, dtype, options.device)
            want = expected([x.cpu() for x in inputs], dy.cpu())  # on the CPU, so that no matrix product of others is looked at
            for chunks in (0, 1):  # to a segment; all shapes but the first have more than one chunk
                with in_segments(chunks):
                    errors = {n: rms(g.cpu(), w) for n, g, w in zip(NAMES, both(wkv7, inputs, dy), want) if w.norm() > 1e-12}
                    if sizes[0] == 1 < sizes[1]:
                        found[f"documents {sizes} {dtype} {chunks}"] = check_documents(sizes, options)
                found[f"wkv7 {sizes} {dtype} {chunks}"] = demand(errors, LIMITS[dtype], "wkv7")
            found[f"wkv4 {sizes} {dtype}"] = check_wkv4(sizes, options)
            for name in (*PASSES, ONE_BLEND):
                found[f"{name} {sizes} {dtype}"] = check_elementwise(name, options)
        options.sizes = (1, 19, 33, 64)  # more than 2048 channels: a kernel of its own
        for name in ("norm_mix", ONE_BLEND):
            found[f"wide {name} {dtype}"] = check_elementwise(name, options)
        for sizes in ((2, 140, 2, 64), (1, 70, 1, 16), (1, 130, 1, 32), (1, 70, 1, 128)):
            found[f"ttt {sizes} {dtype}"] = check_steps(sizes, options)
        for V in (7, 5001):
            found[f"loss {V} {dtype}"] = check_logits(V, options)
        found[f"adamw {dtype}"] = check_adamw(dtype, options)
    for T in (3, 40):  # the forward pass of so few symbols needs no shared memory for them
        found[f"rosa {T}"] = demand({"gradients": rosa.errors(options.device, T)}, 1e-4, "rosa")
    found["rosa of tokens"] = demand({"tokens that are others": rosa.other_tokens(options.device)}, 0, "rosa")
    return {"kernels": len(found), "worst_error": max(found.values())}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("wkv7", *PASSES, "loss", "adamw", "once"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--shape", default="", help="B x T x H x N")
    parser.add_argument("--vocabulary", type=int, default=65536)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--peer", default="", metavar="NAME=PATH")
    options = parser.parse_args(arguments)
    if options.small:
        options.shape, options.rounds, options.warmup, options.vocabulary, options.layers = options.shape or "2x64x2x64", 3, 1, 1000, 2
    options.sizes = tuple(map(int, (options.shape or ("8x4096x64x64" if options.what == "wkv7" else "16x512x12x64")).split("x")))
    options.dtype = torch.bfloat16
    backend.set_kernel("cuda" if options.device == "cuda" else "")  # by name: an error where it cannot run, never a silent fallback
    try:
        row = once(options) if options.what == "once" else None
        if row is None:
            measure = {"wkv7": measure_recurrence, "loss": measure_loss, "adamw": measure_adamw}.get(
                options.what, lambda o: measure_elementwise(options.what, o)
            )
            row = measure(options)
    except Wrong as error:
        print(f"error: {error}; nothing is timed on wrong results", file=sys.stderr)
        return 1
    print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
