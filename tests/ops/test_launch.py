"""What the CUDA operators are given: which tensor reaches a kernel, which is copied, which is refused."""

import contextlib
import ctypes

import pytest
import torch

from rwkvlm import native
from rwkvlm.ops.launch import ask, given, launch

FP32, BF16 = torch.float32, torch.bfloat16


class OnGpu(torch.Tensor):
    """Numbers of the host that say that they lie on another device."""

    number = 1

    @staticmethod
    def made(x, number):
        x = x.as_subclass(OnGpu)
        x.number = number
        return x

    device = property(lambda self: torch.device("cuda", self.number))

    def get_device(self):
        return self.number


def test_a_tensor_that_fits_is_taken_as_it_lies():
    x = torch.zeros(3, 4)
    at = given("op", "x", x)
    assert at("x", x, x.shape) == at("x", x, (3, 4)) == at("x", x, 12) == x.data_ptr() and at("y", None, (3, 4)) is None
    numbers = torch.zeros(5, dtype=torch.int32)
    assert at("numbers", numbers, (5,), torch.int32) == numbers.data_ptr()


@pytest.mark.parametrize("kind", ["begins between two pieces of 16 bytes", "has gaps", "is transposed"])
def test_one_that_the_kernels_cannot_read_is_copied(kind):
    rows = torch.arange(32.0).view(4, 8)
    x = {"begins between two pieces of 16 bytes": torch.arange(33.0)[1:].view(4, 8), "has gaps": rows[:, ::2], "is transposed": rows.t()}[kind]
    at = given("op", "x", x)
    place = at("x", x, x.shape)
    others = [torch.full(x.shape, 99.0) for _ in range(20)]  # the copy's memory is not free yet
    assert place % 16 == 0 and place != x.data_ptr() and others
    assert list((ctypes.c_float * x.numel()).from_address(place)) == x.flatten().tolist()


@pytest.mark.parametrize(
    "x, shape, message",
    [
        (torch.zeros(4, 3), (3, 4), r"op: y must have the shape \[3, 4\], got \[4, 3\]"),
        (torch.zeros(3), 4, r"op: y must have 4 elements, got \[3\]"),
        (torch.zeros(3, 4, dtype=BF16), (3, 4), "op: y must be torch.float32, got torch.bfloat16"),
        (OnGpu.made(torch.zeros(3, 4), 0), (3, 4), "op: y must be on cpu, where x is, got cuda:0"),
    ],
)
def test_what_does_not_fit_is_a_value_error_that_says_what_was_expected(x, shape, message):
    with pytest.raises(ValueError, match=message):
        given("op", "x", torch.zeros(3, 4))("y", x, shape)


@pytest.mark.parametrize("elsewhere, where", [(OnGpu.made(torch.zeros(4), 0), "cuda:0"), (torch.zeros(4), "cpu")], ids=["another GPU", "the host"])
def test_one_device(elsewhere, where):
    x = OnGpu.made(torch.zeros(4), 1)
    at = given("op", "x", x)
    assert at("x", x, (4,)) == x.data_ptr()
    with pytest.raises(ValueError, match=f"op: y must be on cuda:1, where x is, got {where}"):
        at("y", elsewhere, (4,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32])
def test_dtypes_that_no_kernel_reads(dtype):
    with pytest.raises(ValueError, match=f"op: x must be torch.bfloat16 or torch.float32, got {dtype}"):
        given("op", "x", torch.zeros(3, dtype=dtype))


def test_an_error_of_the_caller_and_one_of_the_gpu(monkeypatch):
    class Library:
        code = 0

        def work(self, *_):
            return self.code

    library = Library()
    monkeypatch.setattr(native, "cuda_message", lambda library, code: f"what it was ({code})")
    launch(library, "work", torch.device("cpu"))
    for library.code, kind in ((-1, ValueError), (700, RuntimeError)):
        with pytest.raises(kind, match=r"work: what it was \(-?\d+\)"):
            launch(library, "work", torch.device("cpu"))


@pytest.mark.parametrize("index", [0, 1], ids=["the current GPU", "another one"])
def test_the_gpu_of_the_tensors_is_the_current_one_meanwhile(monkeypatch, index):
    """Kernels ask how many multiprocessors and how much shared memory it has, for sizes that a launch must find again."""
    current, found = [0], []

    @contextlib.contextmanager
    def device(which):
        before, current[0] = current[0], which.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 70 + index, raising=False)
    library = type("Library", (), {"work": staticmethod(lambda *arguments: found.append(current[0]) or arguments[-1] - 70 - index)})
    launch(library, "work", torch.device("cuda", index), 5)
    assert found == [index] and current == [0]
    assert ask(library, "work", torch.device("cuda", index), 90) == 20 - index and found == [index, index]
