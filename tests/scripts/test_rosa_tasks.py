"""bench/rosa_tasks.py: the tasks as data, and the shortest of them trained; the whole of it is in records."""

import json
import sys
from pathlib import Path

import pytest
import torch

from oracles import x080 as oracle

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import rosa_tasks

sys.path.pop(0)
from rwkvlm.config import UserError
from rwkvlm.native import available

needs_kernel = pytest.mark.skipif(not available("rosa")[0], reason="minutes without the C++ kernel")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_counting_is_consecutive_integers():
    idx, targets, asked = rosa_tasks.counting(50, rng())
    assert idx.shape == targets.shape == (50, 127) and asked.all() and torch.equal(idx[:, 1:], targets[:, :-1])
    digits = set()
    for row in torch.cat([idx, targets[:, -1:]], 1).tolist():
        numbers = "".join(map(str, (d if d < 10 else "," for d in row))).split(",")[1:-1]
        assert [int(n) for n in numbers] == [*range(int(numbers[0]), int(numbers[0]) + len(numbers))] and row[0] == rosa_tasks.SEPARATOR
        digits.add(len(numbers[0]))
    assert digits == {1, 2, 3}


def test_recall_asks_for_values_whose_key_has_been_there_with_the_same_value():
    idx, targets, asked = rosa_tasks.recall(20, rng())
    for tokens, want, ask in zip(idx.tolist(), targets.tolist(), asked.tolist()):
        known = {}
        for n, token in enumerate(tokens):
            if n % 2 == 0:
                assert ask[n] == (token in known) and (not ask[n] or want[n] == known[token])
                known[token] = tokens[n + 1]
            else:
                assert not ask[n] and token >= 16
    assert 0.2 < asked.float().mean() < 0.5


def test_copy_asks_for_the_second_half():
    idx, targets, asked = rosa_tasks.copy(5, rng())
    assert torch.equal(idx[:, :32], idx[:, 32:]) and asked.sum() == 5 * 31
    assert torch.equal(targets[asked].view(5, 31), idx[:, 1:32])


def test_reverse_asks_for_the_digits_turned_round_and_the_end():
    idx, targets, asked = rosa_tasks.reverse(300, rng())
    lengths, symbols = set(), "0123456789,#"
    for tokens, want, ask in zip(idx.tolist(), targets.tolist(), asked.tolist()):
        text = "".join(symbols[t] for t in [*tokens, want[-1]])
        number, answer = text.rstrip("#").split(",")
        assert answer == number[::-1] and (number[0] != "0" or len(number) == 1) and want[:-1] == tokens[1:]
        assert "".join(symbols[t] for t, a in zip(want, ask) if a) == f"{answer}#"
        lengths.add(len(number))
    assert {1, 60} <= lengths <= set(range(1, 61)) and len(lengths) > 50


@pytest.mark.parametrize("done, limit", [(0.0, 4), (0.2, 32), (0.4, 60), (1.0, 60)])
def test_while_it_trains_the_numbers_of_a_batch_are_as_long_and_become_longer(done, limit):
    draw = rng()
    batches = [rosa_tasks.reverse(2, draw, done) for _ in range(200)]
    lengths = [idx.shape[1] // 2 for idx, _, asked in batches if (asked.sum(1) == idx.shape[1] // 2 + 1).all()]
    assert len(lengths) == 200 and max(lengths) == limit and 0.3 < sum(n == limit for n in lengths) / 200 < 0.7 and min(lengths) < 4
    assert all(len(idx) == 2 * min(4, limit // n) for (idx, _, _), n in zip(batches, lengths))


def test_long_tasks_run_by_their_names_alone(monkeypatch, tmp_path):
    found = []
    monkeypatch.setattr(
        rosa_tasks, "run", lambda name, *_: found.append(name) or dict(figure="loss", loss=0.0, bar=1.0, met=True, seconds=0.0)
    )
    assert rosa_tasks.main(["--out", str(tmp_path / "r.json")]) == rosa_tasks.main(["--out", str(tmp_path / "r.json"), "reverse"]) == 0
    assert "copy" in found and found.count("reverse") == 1 and found[-1] == "reverse"


def test_frozen_is_what_it_says():
    model = rosa_tasks.language_model(16, 0, apart=True, frozen=True)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {
        f"blocks.0.rosa.{name}" for name in ("x_q", "x_k", "x_v", *(f"{c}.{part}" for c in "qkv" for part in ("weight", "bias")))
    }


@needs_kernel
@pytest.mark.parametrize("name, seed", [("recall", 1), ("copy", 7), ("copy", 18)])
def test_what_follows_is_found(name, seed):
    """With keys that began apart from the queries copying was stuck at 0.61 and 0.44 with these seeds."""
    assert (found := rosa_tasks.run(name, seed))["met"], found


@needs_kernel
def test_the_bits_are_learned():
    """Where queries do not find keys as they begin.

    Of 24 seeds each had more than 0.98, three of them not the 0.99 of the bench; which three, rounding decides.
    """
    assert (found := rosa_tasks.run("recall, k apart", 1))["accuracy"] > 0.95, found


@needs_kernel
@pytest.mark.slow
def test_left_as_such_bits_begin_it_does_not_come_near():
    assert (found := rosa_tasks.run("recall, k apart, q k v frozen", 1))["accuracy"] < 0.8, found


@needs_kernel
def test_what_is_gradual_begins_with_short_numbers(monkeypatch):
    asked = []
    monkeypatch.setitem(
        rosa_tasks.TASKS,
        "reverse",
        rosa_tasks.TASKS["reverse"]._replace(draw=lambda B, rng, *done: asked.append(done) or rosa_tasks.reverse(B, rng, 0.0, 4)),
    )
    found = rosa_tasks.run("reverse", 1, steps=4)
    assert asked == [(0.0,), (0.25,), (0.5,), (0.75,), ()] and found["parameters"] == 39072, found


@needs_kernel
def test_a_record_of_a_task(tmp_path, capsys):
    out = tmp_path / "made" / "r.json"
    assert rosa_tasks.main(["--out", str(out), "--steps", "12", "counting, two"]) == 1
    (found,) = json.loads(out.read_text())["results"]
    assert found["task"] == "counting, two layers" and found["steps"] == 12 and len(found["losses_of_10_steps"]) == 2 and not found["met"]
    assert "bar 0.43: NOT MET" in capsys.readouterr().out


def test_an_unknown_task_is_said(tmp_path):
    with pytest.raises(UserError, match="no task is called sort; choose of: counting, embedding only, "):
        rosa_tasks.main(["--out", str(tmp_path / "r.json"), "sort"])


@pytest.mark.parametrize("bits", [1, 4])
def test_the_self_layer_gives_emb0_or_emb1_and_what_the_official_layer_gives_on_a_miss(bits):
    layer, x = rosa_tasks.RosaSelf(8, bits), torch.randn(2, 12, 8, generator=rng(), dtype=torch.float64)
    assert torch.equal(layer.emb1, torch.full((1, 1, 8), 1e-5)) and torch.equal(layer.emb0, -layer.emb1)
    layer.double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(generator=rng(1))
    low, high = layer.emb0.flatten().tolist(), layer.emb1.flatten().tolist()
    want = [oracle.layer(row, row, row, low, high, bits, bits == 4) for row in (x > 0).long().tolist()]
    assert torch.equal(layer(x), torch.tensor(want, dtype=torch.float64))


def test_embedding_of_the_expected_token():
    layer = rosa_tasks.RosaEmbedding(5, 3).double()
    idx = torch.tensor([[4, 1, 2, 4, 1, 3, 1], [0, 0, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        out = layer(idx)
    expected = [[-1, -1, -1, 1, 2, -1, 3], [-1, 0, 0, 0, 0, 0, 0]]  # 4 1 -> 2, the longer suffix; 1 -> 3, the latest
    for b in range(2):
        for t, token in enumerate(expected[b]):
            assert torch.equal(out[b, t], layer.emb.weight[token] if token >= 0 else torch.zeros(3, dtype=torch.float64)), (b, t)
