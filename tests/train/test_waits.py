"""A training step reads nothing of a device on the host: each such read is a wait for all that the device was given before."""

import traceback
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import rwkvlm
from rwkvlm.train.conductor import Conductor

PACKAGE = Path(rwkvlm.__file__).parent
ATEN = torch.ops.aten
OPERATORS = {ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.equal, ATEN.is_nonzero, ATEN._unique2, ATEN.repeat_interleave}
METHODS = {getattr(torch.Tensor, name) for name in ("tolist", "numpy", "cpu")}  # of what lies on the CPU they read without an operator
EXEMPT = {  # functions that read themselves
    "train/meter.py drain",  # a GPU once a second
    "train/meter.py _numbers",  # as part of it
    "train/module.py on_device",  # before the batch goes to the device
    # what lies on the CPU, and only there:
    "layers/ttt.py forward",
    "ops/wkv7/arguments.py sequence_bounds",
    "ops/cross_entropy/__init__.py _check",
    "ops/cross_entropy/__init__.py backward",
}
TYPES = {
    "x070": dict(),
    "x070 with documents": dict(doc_reset=1),
    "x070 in bf16": dict(precision="bf16", grad_cp=1, accumulate_grad_batches=2),
    "phantom": dict(my_testing="phantom", ttt_chunk=16),
    "phantom with the inner loss": dict(my_testing="phantom", ttt_chunk=16, ttt_meta=1),
    "phantom with a memory": dict(my_testing="phantom", ttt_kind="memory"),
    "hybrid": dict(my_testing="hybrid", attention_layers="1"),
    "hybrid with documents": dict(my_testing="hybrid", attention_layers="1", doc_reset=1),
    "hybrid with a window and documents": dict(my_testing="hybrid", attention_layers="1", attention_window=8, doc_reset=1, grad_cp=1),
    "phantom with documents": dict(my_testing="phantom", ttt_chunk=16, doc_reset=1),
    "phantom with a memory and documents": dict(my_testing="phantom", ttt_kind="memory", doc_reset=1),
    "x080": dict(my_testing="x080"),
    "x080 with documents": dict(my_testing="x080", doc_reset=1),
    "rosa": dict(my_testing="rosa", head_size=None),
    "x040": dict(my_testing="x040", head_size=None),
}


class Reads:
    """Where the host read, while `open`."""

    def __init__(self) -> None:
        self.open, self.found = False, []

    def note(self, what: object) -> None:
        if self.open:
            stack = [(Path(frame.filename), frame) for frame in reversed(traceback.extract_stack()) if not frame.name.startswith("<")]
            own = [f"{path.relative_to(PACKAGE)} {frame.name}:{frame.lineno}" for path, frame in stack if path.is_relative_to(PACKAGE)]
            if own[0].partition(":")[0] not in EXEMPT:
                self.found.append(f"{what}: {' < '.join(own[:4])}")


class Operators(TorchDispatchMode):
    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in OPERATORS:
            self.reads.note(func)
        return func(*args, **kwargs or {})


class Methods(TorchFunctionMode):
    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in METHODS:
            self.reads.note(func)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", TYPES)
def test_a_step_reads_nothing_on_the_host(run, tmp_path, monkeypatch, name):
    """From the beginning of the second micro batch to that of the fourth, with all that Lightning and the Conductor do between."""
    reads, begin = Reads(), Conductor.on_train_batch_start

    def watched(self, trainer, module, batch, batch_idx):
        reads.open = 1 <= batch_idx < 3
        begin(self, trainer, module, batch, batch_idx)

    monkeypatch.setattr(Conductor, "on_train_batch_start", watched)
    with Operators(reads), Methods(reads):
        assert run(tmp_path / "out", **dict(kernel="auto", n_layer=2, max_steps=4) | TYPES[name]) == 0
    assert not reads.found, "\n".join(reads.found)
