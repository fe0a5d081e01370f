"""The check of the kernels before the first step: right ones pass in every kind of model, one wrong gradient ends the run with its cure."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rwkvlm import native
from rwkvlm.config import UserError, env, model_config
from rwkvlm.ops import backend
from rwkvlm.ops import wkv7 as recurrence
from rwkvlm.ops.fused import reference as fused
from rwkvlm.train import run as training
from rwkvlm.train import selfcheck
from rwkvlm.train.selfcheck import answers, check_kernels, small, worst

CPU = torch.device("cpu")
compiled = pytest.mark.skipif(not native.available("wkv7")[0], reason="no C++ compiler")  # both sides are plain PyTorch then
LARGE = dict(n_layer=12, n_embd=768, vocab_size=65536)
MODELS = {
    "x070": ("x070", {}),
    "heads of 128": ("x070", dict(head_size=128)),
    "compressed": ("x070", dict(ranks="att.key=16")),
    "phantom": ("phantom", dict(ghost_permuted=True, dropout=0.5)),
    "values as targets": ("phantom", dict(ttt_target="value", ttt_core_ratio=1.0)),
    "in depth": ("phantom", dict(ttt_meta=True, ttt_chunk=128, max_depth_iter=2, core_ratio=0.5, core_ratios="att.key=0.3")),
    "memory": ("phantom", dict(ttt_kind="memory")),
    "memory, narrow": ("phantom", dict(ttt_kind="memory", ttt_features=64)),
    "hybrid": ("hybrid", dict(attention_layers="1,3,5", attention_kv_heads=3, attention_window=64)),
    "x080": ("x080", dict(deep_embed=True)),
    "no gradient of bits": ("x080", dict(rosa_grad="none", rosa_bits=1)),
    "rosa": ("rosa", {}),
    "x040": ("x040", {}),
}


@pytest.fixture(autouse=True)
def anew():
    """What has been found in this process is forgotten."""
    selfcheck._check.cache_clear()
    yield
    selfcheck._check.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_right_kernels_pass_and_draw_no_random_numbers(name, dtype):
    kind, settings = MODELS[name]
    sizes, before = model_config(kind, **LARGE, **settings), torch.get_rng_state()
    check_kernels(sizes, dtype, CPU)
    assert torch.equal(before, torch.get_rng_state())
    if dtype == torch.float32 or not selfcheck.has_rosa(sizes):
        part, off, most = worst(*answers(small(sizes), dtype, CPU))
        assert off < most / 3, part


class Tf32(TorchDispatchMode):
    """Matrix products of fp32 as --precision tf32 has them on a GPU: of factors with 10 bits behind the point."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        at = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}.get(function.overloadpacket.__name__)
        if at is not None and args[0].dtype == torch.float32:
            args = (*args[:at], *((x.contiguous().view(torch.int32) + (1 << 12) & -1 << 13).view(torch.float32) for x in args[at:]))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["x070", "phantom", "hybrid", "x040"])
def test_right_kernels_pass_beside_products_in_tf32(name):
    """The operators in plain PyTorch have such products, their kernels have not."""
    kind, settings = MODELS[name]
    with Tf32():
        check_kernels(model_config(kind, **LARGE, **settings), torch.float32, CPU)
        part, off, most = worst(*answers(small(model_config(kind, **LARGE, **settings)), torch.float32, CPU))
    assert 3e-4 < off < most, "they are in tf32"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_gradient_that_is_zero_but_for_roundings_is_no_fault(dtype):
    """Queries and keys of an attention that sees one token."""
    check_kernels(model_config("hybrid", **LARGE, attention_window=1), dtype, CPU)


def test_what_is_off_in_one_draw_alone_is_no_fault(monkeypatch):
    """As where a rounding turns a ReLU."""
    drawn = []

    def off_at_first(sizes, dtype, device, draw):
        drawn.append(draw)
        got, *others = answers(sizes, dtype, device, draw)
        return [{name: x + (draw == 0) for name, x in got.items()}, *others]

    monkeypatch.setattr(selfcheck, "answers", off_at_first)
    check_kernels(model_config("x040", **LARGE), torch.float32, CPU)
    assert drawn == [0, 1]


def test_without_a_place_for_kernels_plain_pytorch_passes(monkeypatch):
    def nowhere(*_):
        raise UserError("neither the home folder nor another can be used")

    monkeypatch.setattr(env, "cache_dir", nowhere)
    check_kernels(model_config("x040", **LARGE), torch.float32, CPU)


def turned(form, place):
    """An operator whose gradient of one input has the wrong sign."""

    def wrong(*inputs, **settings):
        x = inputs[place].view_as(inputs[place])
        x.register_hook(torch.neg)
        return form(*inputs[:place], x, *inputs[place + 1 :], **settings)

    return wrong


@compiled
@pytest.mark.parametrize("place", range(6), ids="rwkvab")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_single_wrong_gradient_of_wkv7_is_found(monkeypatch, dtype, place):
    """One side of the comparison is made wrong: that in plain PyTorch."""
    monkeypatch.setattr(recurrence, "wkv7_chunked", turned(recurrence.wkv7_chunked, place))
    with pytest.raises(
        UserError,
        match="a kernel is wrong on this machine: in a small x070 in .*, the gradient of .* is off by .* of itself; "
        ".*rwkvlm doctor.* or use --kernel torch",
    ):
        check_kernels(model_config("x070", **LARGE), dtype, CPU)


@compiled
def test_what_is_wrong_behind_a_chunk_is_found(monkeypatch):
    right = recurrence.wkv7_chunked

    def wrong(r, w, k, v, *others, **settings):
        return right(r, w, k, torch.cat([v[:, :64], -v[:, 64:]], 1), *others, **settings)

    monkeypatch.setattr(recurrence, "wkv7_chunked", wrong)
    with pytest.raises(UserError, match="a kernel is wrong on this machine"):
        check_kernels(model_config("x070", **LARGE), torch.float32, CPU)


def test_a_nan_is_a_fault(monkeypatch):
    one = {"the loss": torch.ones(1)}
    monkeypatch.setattr(selfcheck, "answers", lambda *_: [{"the loss": torch.full((1,), float("nan"))}, one, one])
    with pytest.raises(UserError, match="the loss is off by nan of itself"):
        check_kernels(model_config("x040", **LARGE), torch.float32, CPU)


def test_a_kernel_that_fails_has_its_cure(monkeypatch):
    def fail(x):
        raise RuntimeError("an illegal instruction\nand much besides")

    monkeypatch.setattr(fused, "relu_square", fail)
    with pytest.raises(UserError, match="a kernel fails on this machine: an illegal instruction; "):
        check_kernels(model_config("x040", **LARGE), torch.float32, CPU)


def test_rounding_of_a_gradient_that_should_be_zero_is_no_fault_and_a_nan_is():
    zero = {"the loss": torch.ones(1), "a gradient": torch.zeros(3)}
    for found, fault in ((torch.full((3,), 1e-9), False), (torch.tensor([0.0, float("nan"), 0.0]), True)):
        part, off, most = worst(zero | {"a gradient": found}, zero, zero)
        assert (not off < most) == fault, part


@pytest.mark.parametrize(
    "name, dtype, asked",
    [
        # ROSA's bits turn with a rounding; what is beside it runs in bf16
        ("x080", torch.bfloat16, [("x080", torch.float32), ("x070", torch.bfloat16)]),
        ("rosa", torch.bfloat16, [("rosa", torch.float32)]),
        ("x070", torch.float16, [("x070", torch.float32)]),  # as the kernels compute it
    ],
)
def test_what_is_asked_and_in_which_dtype(monkeypatch, name, dtype, asked):
    found = []
    monkeypatch.setattr(selfcheck, "_check", lambda sizes, dtype, device: found.append((sizes.model_type, dtype)))
    check_kernels(model_config(name), dtype, torch.device("cpu"))
    assert found == asked
    with backend.asked_for("torch"):  # which is what a kernel would be compared with
        check_kernels(model_config(name), dtype, torch.device("cpu"))
    assert found == asked


def test_what_is_furthest_off_is_measured_by_how_far_it_may_be():
    """One gradient that plain PyTorch rounds as far, and one that is off by less, which no rounding explains."""
    one = torch.ones(4)
    got, rounded, wanted = dict(a=1.3 * one, b=1.2 * one), dict(a=1.3 * one, b=one), dict(a=one.double(), b=one.double())
    part, off, most = worst(got, rounded, wanted)
    assert part == "b" and off == pytest.approx(0.2) and off > most


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
def test_too_little_memory_is_no_fault_of_a_kernel(run, tmp_path, monkeypatch, capsys, error):
    """As where another program has the GPU."""

    def full(*_):
        raise error

    monkeypatch.setattr(selfcheck, "answers", full)
    assert run(tmp_path / "out", kernel="auto", max_steps=1) == 1
    assert f"error: out of memory: {error}; --dry_run tells what fits" in capsys.readouterr().err


def test_a_parameter_that_nothing_reads_is_no_fault(monkeypatch):
    """As a model of one's own may have one, and a memory that a short text never writes to."""
    spread = selfcheck.spread

    def with_one_more(sizes, draw):
        model = spread(sizes, draw)
        model.unread = torch.nn.Parameter(torch.ones(3))
        return model

    monkeypatch.setattr(selfcheck, "spread", with_one_more)
    check_kernels(model_config("x070", **LARGE), torch.float32, CPU)


@compiled
def test_a_run_stops_before_it_has_written_weights_and_goes_on_in_plain_pytorch(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recurrence, "wkv7_chunked", turned(recurrence.wkv7_chunked, 1))
    assert run(tmp_path / "out", kernel="auto", max_steps=1) == 2
    assert "error: a kernel is wrong on this machine" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.pth"))
    assert run(tmp_path / "out", kernel="auto", max_steps=1, check_kernels=0) == 0
    monkeypatch.undo()
    assert run(tmp_path / "out", kernel="torch", max_steps=2) == 0


def test_it_is_asked_for_the_model_the_dtype_and_the_device_of_the_run(run, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(training, "check_kernels", lambda *what: asked.append(what))
    assert run(tmp_path, precision="bf16", max_steps=1) == 0
    assert [(sizes.n_embd, dtype, device) for sizes, dtype, device in asked] == [(64, torch.bfloat16, CPU)]


@pytest.mark.parametrize("features", [32, 64, 128])
def test_a_memory_is_checked_with_the_kernel_that_the_run_has(features):
    assert small(model_config("phantom", **LARGE, head_size=32, ttt_kind="memory", ttt_features=features)).ttt_features == features
