"""What one process is tested for elsewhere, in two under DDP and every ZeRO stage: documents, spikes undone, numbers not finite."""

import re

import pytest

STRATEGIES = ("ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
TWO = dict(devices=2, micro_bsz=2)
pytestmark = pytest.mark.slow


def well(results: list[dict]) -> list[str]:
    """What was said, by runs that ended as they should."""
    assert all(result["codes"] == [0, 0] and "Traceback" not in result["said"] for result in results), results
    return [result["said"] for result in results]


def test_doc_reset_gives_the_curve_of_one_process_and_goes_on_exactly(run, forked, losses, same_state, tmp_path):
    """fp32 against one process, whose batch is cut up differently; bf16, with micro batches, stopped in a mini-epoch and gone on."""
    assert run(tmp_path / "one", doc_reset=1) == 0
    jobs = []
    for strategy in STRATEGIES:
        flags = TWO | dict(strategy=strategy, doc_reset=1)
        jobs.append((flags | dict(proj_dir=tmp_path / strategy, val_batches=4), {}))
        flags |= dict(precision="bf16", micro_bsz=1, accumulate_grad_batches=2, max_steps=14)
        jobs += [
            (flags | dict(proj_dir=tmp_path / f"{strategy}-a"), {}),
            (flags | dict(proj_dir=tmp_path / f"{strategy}-b", max_steps=8), {}),
        ]
        jobs.append((flags | dict(proj_dir=tmp_path / f"{strategy}-b", max_steps=6), {}))
    well(forked(*jobs))
    for strategy in STRATEGIES:
        assert losses(tmp_path / strategy) == pytest.approx(losses(tmp_path / "one"), rel=1e-5), strategy
        assert losses(tmp_path / f"{strategy}-a") == losses(tmp_path / f"{strategy}-b"), strategy
        assert same_state(*(tmp_path / f"{strategy}-{name}" / "state" / "step14" for name in "ab")), strategy
    assert losses(tmp_path / "ddp-a") == pytest.approx(losses(tmp_path / "one")[:14], rel=2e-2)


def test_other_models_with_documents_of_which_each_process_has_others(run, forked, losses, tmp_path):
    """No module runs document by document: under ZeRO-3 a process would wait for one that has fewer."""
    kinds = {
        "state": dict(my_testing="phantom", ttt_chunk=16),
        "memory": dict(my_testing="phantom", ttt_kind="memory"),
        "x080": dict(my_testing="x080"),
    }
    kinds["fixed symbols"] = dict(my_testing="x080", rosa_grad="none")
    kinds |= {"hybrid": dict(my_testing="hybrid", attention_layers="1"), "x040": dict(my_testing="x040", head_size=None)}
    flags = dict(doc_reset=1, kernel="auto", max_steps=6)
    jobs = []
    for kind, more in kinds.items():
        assert run(tmp_path / kind / "one", **flags, **more) == 0
        jobs.append((flags | TWO | more | dict(strategy="deepspeed_stage_3", proj_dir=tmp_path / kind / "two"), {}))
    well(forked(*jobs))
    for kind in kinds:
        assert losses(tmp_path / kind / "two") == pytest.approx(losses(tmp_path / kind / "one"), rel=1e-4), kind


def test_the_spike_guard_goes_back_under_every_strategy(run, forked, spoilt, losses, records, same_state, tmp_path):
    """Step 71 reads noise. fp32: the curve of one process with the same guard.

    bf16: the bits of a run that goes on from step 70 with the samples after.
    """
    flags = dict(data_file=spoilt, my_exit_tokens=80 * 128, epoch_save=0, val_every=1000)
    guard = dict(spike_guard=3, spike_snapshot=10)
    assert run(tmp_path / "one", **flags, **guard) == 0
    jobs = []
    for strategy in STRATEGIES:
        two = flags | TWO | dict(strategy=strategy)
        jobs.append((two | guard | dict(proj_dir=tmp_path / strategy), {}))
        two |= dict(precision="bf16", save_steps=70)
        jobs.append((two | guard | dict(proj_dir=tmp_path / f"{strategy}-guarded"), {}))
        without = two | dict(proj_dir=tmp_path / f"{strategy}-without")
        jobs += [(without | dict(max_steps=70), {}), (without, dict(forget=1)), (without, {})]
    said = well(forked(*jobs))
    expected = losses(tmp_path / "one")
    for number, strategy in enumerate(STRATEGIES):
        told = said[5 * number], said[5 * number + 1]
        assert all(
            len(re.findall(r"step 71 is undone, back to the weights of step 70: its loss .*; samples 281 to 284 are lost", text)) == 1
            for text in told
        ), told
        found = records(tmp_path / strategy)
        assert [step for step in found if "undone_to" in found[step]] == [71] and found[71]["undone_to"] == 70
        assert losses(tmp_path / strategy) == pytest.approx(expected, rel=1e-4), strategy
        guarded, without = (tmp_path / f"{strategy}-{name}" for name in ("guarded", "without"))
        curves = [[records(folder)[step]["loss"] for step in range(72, 81)] for folder in (guarded, without)]
        assert curves[0] == curves[1] and same_state(guarded / "state" / "step80", without / "state" / "step80"), strategy


WHOLE = [
    (strategy, precision)
    for strategy in (*STRATEGIES, "deepspeed_stage_2_offload", "deepspeed_stage_3_offload")
    for precision in ("fp32", "bf16")
]
ACCUMULATED = [(strategy, "bf16") for strategy in STRATEGIES]


@pytest.mark.parametrize(
    "flags, cases", [(TWO, WHOLE), (dict(devices=2, micro_bsz=1, accumulate_grad_batches=2), ACCUMULATED)], ids=["whole", "accumulated"]
)
def test_a_bad_sample_in_one_process_is_skipped_by_all(forked, records, same_state, tmp_path, flags, cases):
    """NaN in sample 18, step 5, which one process reads, in one of its micro batches: the weights stay, the run goes on."""
    more = dict(save_steps=1, keep_last=9, max_steps=8)
    told = well(
        forked(*((flags | more | dict(strategy=s, precision=p, proj_dir=tmp_path / f"{s}-{p}"), dict(nan_in=[18])) for s, p in cases))
    )
    norms = []
    for (strategy, precision), said in zip(cases, told):
        out = tmp_path / f"{strategy}-{precision}"
        assert said.count("step 5 is skipped: loss nan") == 1 and "1 in a row, 1 in all" in said, said
        found = records(out)
        assert (
            [step for step in found if found[step].get("skipped")] == [5]
            and found[8]["loss"] < found[4]["loss"]
            and found[8]["grad_norm"] > 0
        ), out
        norms.append(found[4]["grad_norm"])
        parts = found[8]["grad_norms"]
        assert sum(norm**2 for norm in parts.values()) == pytest.approx(found[8]["grad_norm"] ** 2, rel=1e-2) and len(parts) == 5, out
        assert same_state(out / "state" / "step4", out / "state" / "step5"), out
    assert max(norms) < 1.05 * min(norms), "what is clipped is the mean over micro batches, under DeepSpeed too"
