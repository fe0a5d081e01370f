"""--doc_reset: what is packed, and that a packed row is the documents run by themselves."""

import numpy as np
import pytest
import torch

from rwkvlm.config import ModelConfig, model_config
from rwkvlm.data.binidx import BinIdx, BinIdxWriter
from rwkvlm.data.dataset import HeldOutSamples, TrainingSamples
from rwkvlm.data.mixture import MixedSamples, OneByOne
from rwkvlm.data.reset import ResetSamples
from rwkvlm.layers.packed import Packed
from rwkvlm.models import build, init_weights
from rwkvlm.ops import backend
from rwkvlm.ops.cross_entropy import head_cross_entropy

LENGTHS = (5, 1, 0, 17, 30, 2, 2, 41, 9, 64)


@pytest.fixture
def corpus(tmp_path):
    """Documents of 1 to 64 tokens, and an empty one; tokens count up, so that every token says where it is."""
    documents = np.split(np.arange(sum(LENGTHS), dtype=np.uint16), np.cumsum(LENGTHS)[:-1])
    with BinIdxWriter(tmp_path / "documents") as writer:
        for document in documents:
            writer.add(document)
    return str(tmp_path / "documents")


def unpacked(batch: tuple[torch.Tensor, ...]) -> list[list[int]]:
    idx, _, bounds, _ = batch
    return [idx[0, start : stop - 1].tolist() for start, stop in zip(bounds, bounds[1:])]


def test_samples_are_cut_at_the_ends_of_documents(corpus):
    samples = HeldOutSamples(corpus, 16)
    packed = ResetSamples(samples)
    ends = set(np.cumsum(LENGTHS).tolist())
    for numbers in ([1], [3, 7], [10, 1, 2]):
        x, y = samples[np.array(numbers)]
        batch = packed[np.array(numbers)]
        pieces = unpacked(batch)
        assert sum(pieces, []) == x.reshape(-1).tolist() and batch[1].tolist() == y.reshape(-1).tolist()
        assert batch[0][0, batch[3]].tolist() == x.reshape(-1).tolist() and batch[0].shape[1] == x.numel() + len(pieces)
        assert batch[2][0] == 0 and batch[2][-1] == batch[0].shape[1] and batch[2].dtype == torch.int32
        for piece in pieces:
            assert piece == list(range(piece[0], piece[0] + len(piece))) and not ends & set(piece[1:])  # no end inside
            assert piece[0] in ends | {0} or piece[0] % 16 == 0  # and no cut without a reason
    asked = []
    samples.ask_for = asked.append
    packed.ask_for(numbers)
    assert asked == [numbers], "they are read ahead"


def test_documents_of_every_file_of_a_mixture(corpus):
    one = HeldOutSamples(corpus, 16)
    mixed = MixedSamples([one, HeldOutSamples(corpus, 16)], OneByOne([len(one)] * 2))
    numbers = np.array([2, 3, len(one) + 2, len(one) + 3])
    assert (mixed.starts(numbers)[:2] == mixed.starts(numbers)[2:]).all() and (mixed.starts(numbers)[:2] == one.starts(numbers[:2])).all()
    other = HeldOutSamples(corpus, 24)
    with_other = MixedSamples([TrainingSamples(corpus, 24, 5), other], OneByOne([1, len(other)]))
    assert (with_other.starts(np.array([2, 3, 4])) == other.starts(np.array([1, 2, 3]))).all()


SIZES = dict(n_embd=64, vocab_size=256)
MODELS = {
    "x070": ModelConfig(n_layer=3, head_size=32, **SIZES),
    "state": model_config("phantom", n_layer=2, head_size=32, core_ratio=0.5, ttt_chunk=16, **SIZES),
    "memory": model_config("phantom", n_layer=2, head_size=32, ttt_kind="memory", max_depth_iter=2, **SIZES),
    "hybrid": model_config("hybrid", n_layer=3, head_size=32, attention_layers="1,2", attention_window=16, **SIZES),
    "x080": model_config("x080", n_layer=2, head_size=32, rosa_bits=4, deep_embed=True, **SIZES),
    "rosa": model_config("rosa", n_layer=2, rosa_bits=1, **SIZES),
    "x040": model_config("x040", n_layer=3, **SIZES),
}


@pytest.mark.parametrize("kernel", ["torch", "auto"])
@pytest.mark.parametrize("grad_cp", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_a_packed_row_is_the_documents_by_themselves(corpus, kind, kernel, grad_cp):
    """Features, loss and every gradient."""
    model = build(MODELS[kind])
    init_weights(model, 1)
    with torch.no_grad():  # zero matrices would hide errors
        for i, p in enumerate(model.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    backend.set_kernel(kernel)
    idx, targets, bounds, tokens = ResetSamples(HeldOutSamples(corpus, 50))[np.array([1, 3, 2])]
    packed = Packed(bounds, tokens, bounds.numpy())
    x = model.features(idx, grad_cp=grad_cp, packed=packed)[0, tokens]
    loss = head_cross_entropy(x, model.head.weight, targets)
    alone = torch.cat([model.features(idx[:, start : stop - 1])[0] for start, stop in zip(bounds, bounds[1:])])
    expected = head_cross_entropy(alone, model.head.weight, targets)
    assert len(bounds) > 8
    torch.testing.assert_close(x, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
    for name, got, wanted in zip(names, *(torch.autograd.grad(value, parameters) for value in (loss, expected)), strict=True):
        assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max() + 1e-8, name
    whole = model.features(HeldOutSamples(corpus, 50)[np.array([1, 3, 2])][0])
    assert (whole.reshape(-1, 64) - x).abs().max() > 1e-2  # it does make a difference


RUNS = {
    "x070": dict(),
    "in bf16": dict(precision="bf16", grad_cp=1, kernel="auto"),
    "phantom": dict(my_testing="phantom", ttt_chunk=16, kernel="auto"),
    "x080": dict(my_testing="x080", kernel="auto"),
    "x040": dict(my_testing="x040", head_size=None, kernel="auto"),
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_with_it_stops_and_goes_on_exactly(run, whole, losses, records, tmp_path, kind):
    flags = RUNS[kind]
    for name, stops in (("a", [None]), ("b", [13, None])):
        for stop in stops:
            assert run(tmp_path / name, doc_reset=1, max_steps=stop, **flags) == 0
    curve, bar = losses(tmp_path / "a"), 5.0 if kind == "x080" else 4.6  # it begins at 5.6
    assert curve == losses(tmp_path / "b") and sum(curve[-5:]) / 5 < bar
    assert curve[1:] != losses(whole)[1:] and records(tmp_path / "a", "val_loss")[30]["val_loss"] < bar + 0.1


def test_without_documents_it_is_the_same_run(run, data, losses, tmp_path):
    """One document: nothing to cut but the samples, which begin anew anyway."""
    with BinIdxWriter(tmp_path / "one") as writer:
        writer.add(BinIdx(data).tokens)
    for name, reset in (("a", 0), ("b", 1)):
        assert run(tmp_path / name, data_file=tmp_path / "one", doc_reset=reset, max_steps=8) == 0
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-5)


def test_what_has_no_documents_is_refused(run, tmp_path, capsys):
    np.save(tmp_path / "tokens.npy", np.arange(20000) % 256)
    assert run(tmp_path / "out", data_file=tmp_path / "tokens.npy", data_type="numpy", doc_reset=1, max_steps=1) == 2
    assert "does not say where documents begin; use --data_type binidx" in capsys.readouterr().err
    assert run(tmp_path / "out", doc_reset=1, my_testing="phantom", ctx_len=128, ttt_meta=1) == 2
    assert "--doc_reset 1 is not made for --ttt_meta 1" in capsys.readouterr().err
