"""What the CUDA operators are given: which tensor reaches a kernel, which is copied, which is refused; and what its error code becomes.

Their code is cuda/common/launch.h.
"""

import ctypes
import subprocess

import pytest
import torch

from rwkvlm import native
from rwkvlm.ops import cross_entropy, launch  # noqa: F401  (the first defines loss_of_logits)
from rwkvlm.ops.launch import register

FP32, ROWS = torch.float32, 4
OPERATOR = torch.ops.rwkvlm.loss_of_logits.default
LIBRARY = """
int answer;
void *given_logits, *given_targets, *given_losses;
long long seen[4];
int loss_of_logits(void* x, long long* t, void* l, long long rows) {
    given_logits = x, given_targets = t, given_losses = l;
    for (int i = 0; i < rows; i++) seen[i] = t[i];
    return answer;
}
const char* cuda_message(int code) { return code < 0 ? "not taken" : "broken"; }
"""


def compiled(folder, text):
    (folder / "library.c").write_text(text)
    subprocess.run([native.env.cxx(), "-x", "c", "-O1", "-shared", "-fPIC", "library.c", "-o", "library.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "library.so"))


@pytest.fixture
def library(tmp_path):
    """In the place of that of cuda/loss: it says what it was given."""
    try:
        native.load_launches("loss")
    except native.NativeBuildError as error:
        pytest.skip(str(error))
    library = compiled(tmp_path, LIBRARY)
    forms = register("loss", library, "CPU")
    yield library
    torch.ops.rwkvlm.loss_unregister(forms)
    with pytest.raises(NotImplementedError):
        call()


def call(logits=None, targets=None, losses=None):
    logits = torch.zeros(ROWS, 3) if logits is None else logits
    targets = torch.zeros(ROWS, dtype=torch.int64) if targets is None else targets
    losses = torch.zeros(ROWS) if losses is None else losses
    OPERATOR.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), logits, targets, losses, 1.0, 0.1, True)
    return logits, targets, losses


def given(library):
    return [ctypes.c_void_p.in_dll(library, f"given_{name}").value for name in ("logits", "targets", "losses")]


def test_a_tensor_that_fits_is_taken_as_it_lies(library):
    logits, targets, losses = call(targets=torch.arange(ROWS))
    assert given(library) == [logits.data_ptr(), targets.data_ptr(), losses.data_ptr()]


@pytest.mark.parametrize("kind", ["begins between two pieces of 16 bytes", "has gaps"])
def test_one_that_the_kernels_cannot_read_is_copied(library, kind):
    numbers = torch.arange(1, 2 * ROWS + 1)
    targets = numbers[1 : ROWS + 1] if kind.startswith("begins") else numbers[::2]
    call(targets=targets)
    assert given(library)[1] % 16 == 0 and given(library)[1] != targets.data_ptr()
    assert list((ctypes.c_longlong * ROWS).in_dll(library, "seen")) == targets.tolist()


def test_a_result_is_written_to_where_it_lies(library):
    losses = torch.zeros(ROWS + 1)[1:]
    call(losses=losses)
    assert given(library)[2] == losses.data_ptr() and losses.data_ptr() % 16


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(targets=torch.zeros(3, dtype=torch.int64)), r"loss_of_logits: targets must have the shape \[4\], got \[3\]"),
        (dict(targets=torch.zeros(ROWS)), "loss_of_logits: targets must be torch.int64, got torch.float32"),
        (
            dict(targets=torch.zeros(ROWS, dtype=torch.int64, device="meta")),
            "loss_of_logits: targets must be on cpu, where logits is, got meta",
        ),
        (
            dict(losses=torch.zeros(2 * ROWS)[::2]),
            r"loss_of_logits: losses must be contiguous, got strides \[2\]; call .contiguous\(\) first",
        ),
        (
            dict(logits=torch.zeros(ROWS, 3, dtype=torch.int32)),
            "loss_of_logits: logits must be torch.bfloat16 or torch.float32, got torch.int32",
        ),
    ],
)
def test_what_does_not_fit_is_a_value_error_that_says_what_was_expected(library, wrong, message):
    with pytest.raises(ValueError, match=message):
        call(**wrong)
    assert given(library) == [None] * 3


def test_an_error_of_the_caller_and_one_of_the_gpu(library):
    code = ctypes.c_int.in_dll(library, "answer")
    for code.value, kind, message in ((-1, ValueError, r"not taken \(-1\)"), (700, RuntimeError, r"broken \(700\)")):
        with pytest.raises(kind, match=f"loss_of_logits: {message}"):
            call()
    code.value = 0
    call()


def test_a_library_that_lacks_a_function_is_refused(library, tmp_path_factory):
    with pytest.raises(RuntimeError, match="loss_of_logits is not in the library"):
        register("loss", compiled(tmp_path_factory.mktemp("other"), 'const char* cuda_message(int code) { return ""; }\n'), "CPU")
    call()


def test_what_is_built_for_a_gpu_is_registered_once(monkeypatch):
    asked, why = [], ""
    monkeypatch.setattr(native, "cuda_available", lambda name: (not why, why))
    monkeypatch.setattr(native, "cuda_library", lambda name: f"library of {name}")
    monkeypatch.setattr(launch, "register", lambda *arguments: asked.append(arguments))
    assert [launch.why_not_built("toy") for _ in range(2)] == ["", ""] and asked == [("toy", "library of toy", "CUDA")]
    why = "no GPU"
    assert launch.why_not_built("another") == "no GPU" and len(asked) == 1
