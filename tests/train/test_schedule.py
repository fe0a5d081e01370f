"""The learning rate against values worked out by hand, and against the official formula."""

import math

import pytest

from rwkvlm.train.schedule import Schedule

STEP = 1000  # tokens


def schedule(warmup_steps=10, lr_init=6e-4, lr_final=6e-5, exit_tokens=110 * STEP) -> Schedule:
    return Schedule(lr_init, lr_final, warmup_steps, exit_tokens, STEP)


@pytest.mark.parametrize(
    "tokens, warmup_step, lr",
    [
        (0, 0, 6e-6),  # 1% of lr_init
        (5 * STEP, 5, 6e-4 * 0.505),  # 0.01 + 0.99 / 2
        (10 * STEP, 10, 6e-4),  # the cosine begins
        (60 * STEP, 60, 3.3e-4),  # half way: the mean of both ends
        (35 * STEP, 35, 3.3e-4 + 2.7e-4 * math.sqrt(0.5)),  # a quarter: cos(pi/4)
        (85 * STEP, 85, 3.3e-4 - 2.7e-4 * math.sqrt(0.5)),
        (110 * STEP, 110, 6e-5),
        (999 * STEP, 999, 6e-5),
    ],
)
def test_values_by_hand(tokens, warmup_step, lr):
    assert schedule().lr(tokens, warmup_step) == pytest.approx(lr, rel=1e-12)


def test_equals_the_official_formula_everywhere():
    s = schedule(warmup_steps=7, lr_init=8e-4, lr_final=3e-5, exit_tokens=99_500)
    for step in range(100):
        progress = max(0, min(1, (step * STEP - 7 * STEP) / (99_500 - 7 * STEP)))
        f = 3e-5 / 8e-4
        official = 8e-4 * ((0.5 + f / 2) + (0.5 - f / 2) * math.cos(math.pi * progress))
        if step < 7:
            official *= 0.01 + 0.99 * step / 7
        assert s.lr(step * STEP, step) == pytest.approx(official, rel=1e-12)


def test_warm_up_counts_its_own_steps():
    """After a restart from weights alone the ramp comes again, in the middle of the cosine."""
    s = schedule()
    assert s.lr(60 * STEP, 0) == pytest.approx(0.01 * 3.3e-4)
    assert s.lr(60 * STEP, 10) == pytest.approx(3.3e-4)


def test_end_is_where_progress_reaches_one():
    s = schedule()
    assert not s.finished(110 * STEP - 1) and s.finished(110 * STEP)
    assert s.progress(110 * STEP - 1) < 1 == s.progress(110 * STEP)
    assert s.steps_left(0) == 110 and s.steps_left(109 * STEP) == 1 and s.steps_left(110 * STEP) == s.steps_left(111 * STEP) == 0
    assert schedule(exit_tokens=110 * STEP + 1).steps_left(0) == 111


@pytest.mark.parametrize("lr_init, lr_final", [(0.0, 1e-4), (1e-4, 0.0), (0.0, 0.0), (1e-4, 1e-4)])
def test_zero_and_equal_rates_are_the_same_cosine(lr_init, lr_final):
    s = schedule(0, lr_init, lr_final, 100 * STEP)
    assert [s.lr(t * STEP, t) for t in (0, 50, 100)] == pytest.approx([lr_init, (lr_init + lr_final) / 2, lr_final])


def test_a_run_shorter_than_its_warm_up_still_ends():
    s = schedule(warmup_steps=10, exit_tokens=3 * STEP)
    assert s.steps_left(0) == 3 and s.progress(2 * STEP) == 0 and s.finished(3 * STEP)
    assert [s.lr(t * STEP, t) for t in range(3)] == pytest.approx([6e-4 * (0.01 + 0.099 * t) for t in range(3)])


def test_wsd_stays_until_its_last_part_and_falls_to_the_end():
    s = Schedule(6e-4, 6e-5, 10, 100 * STEP, STEP, "wsd", 0.2)
    assert s.lr(0, 0) == pytest.approx(6e-6)
    assert [s.lr(t * STEP, t) for t in (10, 40, 80)] == pytest.approx([6e-4] * 3, rel=1e-12)
    assert s.lr(85 * STEP, 85) == pytest.approx(3.3e-4) and s.lr(100 * STEP, 100) == pytest.approx(6e-5)  # sqrt(1/4) is half of the way
    falling = [s.lr(t * STEP, t) for t in range(80, 101)]
    assert falling == sorted(falling, reverse=True) and len(set(falling)) == 21
    longer = Schedule(6e-4, 6e-5, 10, 200 * STEP, STEP, "wsd", 0.2)
    assert [longer.lr(t * STEP, t) for t in range(81)] == [s.lr(t * STEP, t) for t in range(81)]  # what makes a run prolongable


def test_constant_stays_after_the_warm_up():
    s = Schedule(6e-4, 6e-5, 10, 100 * STEP, STEP, "constant")
    assert s.lr(5 * STEP, 5) == pytest.approx(6e-4 * 0.505) and [s.lr(t * STEP, t) for t in (10, 50, 99)] == [6e-4] * 3


@pytest.mark.parametrize("shape, rates", [("wsd", (2e-3, 2e-3, 2e-4)), ("constant", (2e-3, 2e-3, 2e-3))])
def test_a_run_follows_it(run, records, tmp_path, shape, rates):
    assert (
        run(tmp_path / "out", lr_schedule=shape, wsd_decay=0.5, max_steps=17) == 0
        and run(tmp_path / "out", lr_schedule=shape, wsd_decay=0.5) == 0
    )
    lrs = {step: record["lr"] for step, record in records(tmp_path / "out").items()}
    assert (lrs[6], lrs[16]) == pytest.approx(rates[:2]) and lrs[30] == pytest.approx(rates[2], rel=0.35) and len(lrs) == 30
