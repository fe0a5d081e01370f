"""bench/recall.py: associative recall as data, and what is measured on it."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import recall

sys.path.pop(0)
TASK = recall.Task(pairs=6, keys=9, values=4)


def test_a_sequence_is_pairs_then_every_key_with_its_value():
    tokens, order = recall.sequences(TASK, 1, 40)
    assert tokens.shape == (40, TASK.length) and tokens.dtype == np.uint16
    for row, places in zip(tokens.tolist(), order.tolist()):
        pairs, asked = (list(zip(half[::2], half[1::2])) for half in (row[:12], row[12:]))
        keys = [key for key, _ in pairs]
        assert len(set(keys)) == 6 and all(1 <= key <= 9 for key in keys)
        assert all(10 <= value < TASK.vocabulary for _, value in pairs)
        assert sorted(places) == [*range(6)] and asked == [pairs[place] for place in places]


def test_sequences_are_a_function_of_seed_and_number():
    many, _ = recall.sequences(TASK, 1, 3 * recall.BLOCK + 1)
    few, _ = recall.sequences(TASK, 1, 5)
    other, _ = recall.sequences(TASK, 2, 5)
    assert np.array_equal(many[:5], few) and not np.array_equal(few, other)
    assert len(np.unique(many, axis=0)) == len(many)
    value_of_key_1 = {row[2 * place + 1] for row in many for place in range(6) if row[2 * place] == 1}
    assert len(value_of_key_1) == 4  # nothing can be learned by heart


def test_the_mixture_is_pairs_and_rounds_of_questions():
    task = recall.Task(pairs=16, keys=20, values=5)
    assert [part.pairs for part in recall.levels(task)] == [16, 8, 4] and [part.pairs for part in recall.levels(TASK)] == [6]
    tokens = recall.mixture(task, 1, 300)
    assert (
        tokens.shape == (300, 64)
        and np.array_equal(recall.mixture(task, 1, 3), tokens[:3])
        and not np.array_equal(recall.mixture(task, 2, 3), tokens[:3])
    )

    def holds(row, pairs):  # pairs of different keys, then the same again and again, each time in another order
        first, *rounds = [[*map(tuple, part)] for part in row.reshape(-1, pairs, 2).tolist()]
        return (
            len({key for key, _ in first}) == pairs
            and all(sorted(part) == sorted(first) for part in rounds)
            and (pairs == 16 or len({*map(tuple, rounds)}) > 1)
        )

    kinds = [[pairs for pairs in (16, 8, 4) if holds(row, pairs)] for row in tokens]
    assert all(len(kind) == 1 for kind in kinds)
    assert {pairs: 70 < kinds.count([pairs]) < 130 for pairs in (16, 8, 4)} == {16: True, 8: True, 4: True}


@pytest.mark.parametrize("sizes", [dict(pairs=10, keys=9), dict(pairs=0), dict(values=1), dict(keys=65000, values=1000)])
def test_tasks_that_cannot_be(sizes, capsys, tmp_path):
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    assert recall.main(["make", "--seed", "1", "--samples", "1", "--out", str(tmp_path / "x.npy"), *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_data_are_written_where_there_is_no_folder_yet(tmp_path):
    assert (
        recall.main(
            [
                "make",
                "--seed",
                "1",
                "--samples",
                "3",
                "--pairs",
                "6",
                "--keys",
                "9",
                "--values",
                "4",
                "--out",
                str(tmp_path / "new" / "x.npy"),
            ]
        )
        == 0
    )
    assert np.load(tmp_path / "new" / "x.npy").shape == (3 * TASK.length,)


class Oracle:
    """Answers from the text itself, wrongly where `forgets` says so; everywhere else its scores are those of token 0."""

    def __init__(self, forgets):
        self.forgets = forgets
        self.head = torch.nn.Identity()

    def features(self, idx):
        scores = torch.zeros(*idx.shape, TASK.vocabulary)
        scores[..., 0] = 5.0
        for b, row in enumerate(idx.tolist()):
            pairs = (len(row) + 1) // 4
            places = {row[2 * place]: place for place in range(pairs)}
            for t in range(2 * pairs, len(row), 2):
                place = places[row[t]]
                scores[b, t, 0 if self.forgets(place) else row[2 * place + 1]] = 50.0
        return scores


def test_accuracy_counts_the_answers_alone():
    perfect, half = (
        recall.answers(Oracle(lambda place: False), TASK, 50),
        recall.answers(Oracle(lambda place: place < 3), TASK, 50, batch=7),
    )
    assert perfect["accuracy"] == 1 and perfect["loss"] < 1e-6 and perfect["by_quarter"] == [1, 1, 1, 1]
    assert half["accuracy"] == 0.5 and half["loss"] == pytest.approx(25, abs=0.1)
    assert half["by_quarter"] == [0, 0, 1, 1]  # places 0 1, 2, 3 4, 5


def test_every_number_of_pairs_is_measured():
    task = recall.Task(pairs=8, keys=9, values=4)
    found = recall.by_pairs(Oracle(lambda place: place >= 6), task, 40)
    assert {pairs: part["accuracy"] for pairs, part in found["by_pairs"].items()} == {"4": 1, "8": 0.75}
    assert (
        found["accuracy"] == 0.75
        and found["loss"] == found["by_pairs"]["8"]["loss"] > found["by_pairs"]["4"]["loss"]
        and found["sequences"] == 40
    )
