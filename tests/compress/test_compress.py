"""Compression: error bounds of both methods, identity to the bit, and files that load, generate and train on."""

import json

import numpy as np
import pytest
import torch

from rwkv7_ttt_phantom import RWKV7PhantomConfig, load_pretrained_rwkv7
from rwkvlm.checkpoint.pth import load_into, load_weights, save_weights
from rwkvlm.cli import main
from rwkvlm.compress import compress_file, measure
from rwkvlm.compress.measure import Text, activity
from rwkvlm.compress.sparsity import importance, remove_units
from rwkvlm.compress.svd import factorise, factorise_matrices, rank_for
from rwkvlm.compress.weights import product, whole
from rwkvlm.config import ModelConfig, UserError, model_config
from rwkvlm.data.binidx import BinIdxWriter
from rwkvlm.infer import load_engine
from rwkvlm.layers.channel_mix import ChannelMix
from rwkvlm.models import build, init_weights, param_groups, read_config
from rwkvlm.models.phantom import from_rwkv7

SIZES = dict(n_layer=2, n_embd=64, vocab_size=256, head_size=32)
KINDS = {
    "rwkv7": dict(model_type="x070"),
    "rwkv7, odd width": dict(model_type="x070", dim_ffn=101),
    "phantom without ghosts": dict(model_type="phantom", core_ratio=1.0, ttt_chunk=16),
    "phantom": dict(model_type="phantom", core_ratio=0.5, ttt_chunk=16),
    "phantom of an rwkv7": dict(model_type="phantom", core_ratios="ffn.key=0.125", ttt_chunk=16, ghost_permuted=True),
    "phantom, memory, relu": dict(
        model_type="phantom", core_ratio=0.25, core_ratios="ffn.key=0.125", ttt_kind="memory", ttt_features=32, ghost_activation="relu"
    ),
}


def alive(**settings):
    """A model away from its initial values, whose numbers all fit bfloat16, as those in its file do."""
    model = build(model_config(**SIZES, **settings))
    init_weights(model, 0)
    if settings.get("ghost_permuted"):
        load_into(model, from_rwkv7(alive(model_type="x070").state_dict(), model))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g) / p.shape[-1] ** 0.5)
            p.copy_(p.bfloat16())
    return model.eval()


@pytest.fixture
def file(tmp_path):
    def make(kind):
        save_weights(tmp_path / "in.pth", alive(**KINDS[kind]).state_dict())
        return tmp_path / "in.pth"

    return make


def logits(path, idx):
    tensors = load_weights(path)
    model = build(read_config(tensors))
    load_into(model, tensors)
    with torch.no_grad():
        return model.eval()(idx)


IDX = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(64, 64), (256, 64), (64, 250)])
def test_error_of_factors_is_the_tail_of_the_singular_values(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(weight.double())
    for rank in (1, 8, 31, 60):
        down, up = factorise(weight, rank)
        assert down.shape == (rank, shape[1]) and up.shape == (shape[0], rank)
        assert torch.allclose(down.norm(dim=1), up.norm(dim=0), rtol=1e-4), "the singular values are shared equally"
        error = (up.double() @ down.double() - weight.double()).norm()
        assert error == pytest.approx(values[rank:].square().sum().sqrt().item(), rel=1e-5)
    down, up = factorise(weight, 64)
    assert torch.allclose(up @ down, weight, atol=1e-4)


def test_ranks_save_what_was_asked_for_or_do_nothing():
    assert rank_for(0.5, 1024, 1024) == 256 and rank_for(0.5, 1024, 4096) == 408
    assert rank_for(1.0, 1024, 1024) == 0 and rank_for(0.999, 1024, 1024) == 0 and rank_for(0.001, 1024, 1024) == 8
    assert rank_for(0.9, 8, 8) == 0
    for ratio in (0.1, 0.3, 0.7):
        rank = rank_for(ratio, 768, 3072)
        assert rank % 8 == 0 and rank * (768 + 3072) / (768 * 3072) == pytest.approx(ratio, abs=8 * 3840 / (2 * 768 * 3072))


def test_reported_errors_are_those_of_the_written_matrices():
    weights = alive(model_type="x070").state_dict()
    smaller, errors = factorise_matrices(weights, ModelConfig(**SIZES), 0.5)
    for name, error in errors.items():
        squares = []
        for layer in range(2):
            before, after = (product(w, f"blocks.{layer}.{name}") for w in (weights, smaller))
            squares.append(((after - before).norm() / before.norm()).item() ** 2)
        assert error == pytest.approx(np.mean(squares) ** 0.5, rel=1e-4) and 0.05 < error < 1
    assert len(errors) == 6
    again, errors = factorise_matrices(smaller, read_config(smaller), 0.75)
    assert errors == {} and again.keys() == smaller.keys(), "two factors of a larger rank would save nothing"


def test_error_of_removal_is_bounded_by_the_removed_units():
    config = ModelConfig(**SIZES)
    weights = alive(model_type="x070").state_dict()
    smaller = remove_units(weights, config, 0.3)
    left = read_config(smaller).dim_ffn
    assert left == 176
    for layer in range(2):
        key, value = (weights[f"blocks.{layer}.ffn.{name}.weight"] for name in ("key", "value"))
        worth = key.norm(dim=1) * value.norm(dim=0)
        assert torch.allclose(importance(weights, layer), worth)
        keep = worth.sort(descending=True).indices[:left].sort().values
        assert torch.equal(smaller[f"blocks.{layer}.ffn.key.weight"], key[keep])
        assert torch.equal(smaller[f"blocks.{layer}.ffn.value.weight"], value[:, keep])
        gone = torch.ones(256, dtype=torch.bool).index_fill(0, keep, False)
        linear = value @ key - smaller[f"blocks.{layer}.ffn.value.weight"] @ smaller[f"blocks.{layer}.ffn.key.weight"]
        assert 0 < linear.norm() <= worth[gone].sum()

        x = torch.randn(3, 50, 64, generator=torch.Generator().manual_seed(layer))
        outputs = []
        for tensors in (weights, smaller):
            mix = ChannelMix(read_config(tensors))
            mix.load_state_dict(
                {name.removeprefix(f"blocks.{layer}.ffn."): t for name, t in tensors.items() if name.startswith(f"blocks.{layer}.ffn.")}
            )
            with torch.no_grad():
                outputs.append(mix(x, None, lambda x, *_: (x, x[:, -1], [x]))[1])  # its input is x itself
        bound = x.norm(dim=-1) ** 2 * (key.norm(dim=1) ** 2 * value.norm(dim=0))[gone].sum()
        assert ((outputs[0] - outputs[1]).norm(dim=-1) <= bound * 1.0001).all() and not torch.equal(*outputs)


@pytest.mark.parametrize("kind", KINDS)
def test_units_that_do_nothing_are_removed_without_a_trace(file, kind):
    path = file(kind)
    weights = dict(load_weights(path))
    config = read_config(weights)
    dead = torch.randperm(config.dim_ffn, generator=torch.Generator().manual_seed(3))[: config.dim_ffn // 2]
    for layer in range(2):
        for name in (f"blocks.{layer}.ffn.value.weight", f"blocks.{layer}.ffn.value.core.weight"):
            if name in weights:
                weights[name] = weights[name].index_fill(1, dead, 0)
    save_weights(path, weights)
    compress_file(path, path.with_name("out.pth"), sparsity_ratio=0.2)
    after = read_config(load_weights(path.with_name("out.pth")))
    assert after.dim_ffn == 16 * round(config.dim_ffn * 0.8 / 16) and after.ranks == ""
    want, got = logits(path, IDX), logits(path.with_name("out.pth"), IDX)
    assert (got - want).abs().max() < 2e-5 * want.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_ratios_1_and_0_are_the_identity_to_the_bit(file, kind):
    path = file(kind)
    report = compress_file(path, path.with_name("out.pth"), 1.0, 0.0)
    before, after = load_weights(path), load_weights(path.with_name("out.pth"))
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert report["svd_error"] == {} and report["ranks"] == {}


@pytest.mark.parametrize("kind", KINDS)
def test_file_is_smaller_loads_generates_and_is_compressed_again(file, kind):
    path = file(kind)
    out, again = path.with_name("out.pth"), path.with_name("again.pth")
    report = compress_file(path, out, 0.5, 0.25)
    for name in ("parameters", "bytes", "flops_per_token", "dim_ffn"):
        assert report[name]["after"] < report[name]["before"], name
    tensors = load_weights(out)
    assert report["bytes"]["after"] == out.stat().st_size and set(report["ranks"]) == set(report["svd_error"]) != set()
    config = read_config(tensors)
    dense = whole(tensors, "blocks.1.ffn.key"), whole(tensors, "blocks.1.ffn.value")
    assert dense[0].shape == (config.dim_ffn, 64) and dense[1].shape == (64, config.dim_ffn)
    engine = load_engine(out, tokenizer="world", device="cpu")
    assert engine._step is None, "the native step knows dense matrices only"
    whole_text = logits(out, IDX[:1])[0, -1]
    _, state = engine.read(IDX[0, :-1].tolist())
    one, _ = engine.read(IDX[0, -1:].tolist(), state)
    assert torch.allclose(one[0], whole_text, atol=1e-4 * whole_text.abs().max().item())
    compress_file(out, again, 0.25, 0.1)
    twice = read_config(load_weights(again))
    assert twice.dim_ffn < config.dim_ffn and all(twice.rank_of()[name] <= rank for name, rank in config.rank_of().items())
    assert logits(again, IDX).isfinite().all()


@pytest.mark.parametrize("kind", ["rwkv7", "phantom"])
def test_factors_are_parameters_like_the_matrix(file, kind):
    path = file(kind)
    compress_file(path, path.with_name("out.pth"), 0.5)
    model = build(read_config(load_weights(path.with_name("out.pth"))))
    init_weights(model, 0)
    groups = {name: (group["weight_decay"], group["my_lr_scale"]) for group in param_groups(model, 0.1) for name in group["names"]}
    factors = [name for name in groups if ".down." in name or ".up." in name]
    assert len(factors) >= 16 and {groups[name] for name in factors} == {(0.1, 1.0)}
    assert not any(tensor.isnan().any() for tensor in model.state_dict().values())
    ups = [p for name, p in model.named_parameters() if name.endswith(("att.output.up.weight", "att.output.core.up.weight"))]
    assert ups and all((p == 0).all() for p in ups), "blocks begin as the identity, as with dense matrices"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for name, seed in (("text", 0), ("text.val", 1)):
        walk = np.cumsum(np.random.default_rng(seed).integers(0, 5, 4000)) % 256
        with BinIdxWriter(folder / name, np.uint16) as writer:
            writer.add(walk.astype(np.uint16))
    return str(folder / "text")


def test_activity_is_what_the_units_put_out(text):
    model = alive(model_type="x070")
    sample = Text(text, 64, 3, 256)
    found = activity(model, sample)
    seen = []
    model.blocks[1].ffn.value.register_forward_hook(lambda module, inputs, y: seen.append(inputs[0]))
    with torch.no_grad():
        for x, _ in sample:
            model(x)
    hidden = torch.cat(seen).flatten(0, 1)
    assert torch.allclose(found[1], hidden.square().mean(0).sqrt(), rtol=1e-4)
    weights = model.state_dict()
    assert torch.allclose(importance(weights, 1, found[1]), found[1] * weights["blocks.1.ffn.value.weight"].norm(dim=0))


@pytest.mark.parametrize("kind", ["rwkv7", "phantom", "phantom of an rwkv7"])
def test_what_a_matrix_amounts_to(kind):
    model = alive(**KINDS[kind])
    with torch.no_grad():
        assert torch.allclose(whole(model.state_dict(), "blocks.1.ffn.key"), model.blocks[1].ffn.key(torch.eye(64)).T, atol=1e-5)


def test_a_text_is_read_all_over(text):
    assert Text(text, 64, 3, 256).numbers.tolist() == [1, 21, 41] and Text(text, 64, 100, 256).numbers.tolist() == [*range(1, 63)]


def test_what_units_put_out_on_the_training_text_decides(text, file):
    path = file("rwkv7")
    compress_file(path, path.with_name("out.pth"), sparsity_ratio=0.3, data=text, ctx_len=64, samples=3)
    model, weights, written = measure.load(path), load_weights(path), load_weights(path.with_name("out.pth"))
    same = []
    for of in (text, f"{text}.val", ""):
        want = remove_units(weights, model.config, 0.3, activity(model, Text(of, 64, 3, 256)) if of else None)
        same.append(all(torch.equal(written[name], want[name]) for name in want))
    assert same == [True, False, False]


@pytest.mark.parametrize("kind", ["rwkv7", "phantom of an rwkv7"])
def test_command_measures_the_loss_and_training_goes_on(text, file, tmp_path, capsys, kind):
    flags = [
        "train", "--my_testing", KINDS[kind]["model_type"], "--data_file", text, "--ctx_len", "32", "--micro_bsz", "4",
        "--accelerator", "cpu", "--precision", "fp32", "--kernel", "torch", "--random_seed", "1", "--epoch_samples", "16",
        "--lr_init", "2e-3", "--warmup_steps", "2", "--devices", "1", "--enable_progress_bar", "0", "--train_stage", "3",
    ]  # fmt: skip
    path, out = file(kind), tmp_path / "out.pth"
    command = [
        "compress", "--model", str(path), "--out", str(out), "--svd_rank_ratio", "0.5", "--sparsity_ratio", "0.3", "--data", text,
        "--ctx_len", "64", "--samples", "4", "--report", str(tmp_path / "folder" / "report.json"),
    ]  # fmt: skip
    assert main(command) == 0
    report = json.loads((tmp_path / "folder" / "report.json").read_text())
    table = capsys.readouterr().out
    assert f"{report['parameters']['after']:,}" in table and "text.val" in table and "rank" in table
    assert report["loss"]["before"] != report["loss"]["after"] and all(0 < loss < 20 for loss in report["loss"].values())
    run = [*flags, "--load_model", str(out), "--proj_dir", str(tmp_path / "run"), "--my_exit_tokens", str(12 * 4 * 32)]
    assert main([*run, "--max_steps", "5"]) == 0
    assert main(run) == 0, "and from its training state"
    trained = tmp_path / "run" / "rwkv-final.pth"
    assert read_config(load_weights(trained)) == read_config(load_weights(out))
    losses = [compress_file(p, tmp_path / "same.pth", data=text, ctx_len=64, samples=4)["loss"]["before"] for p in (out, trained)]
    assert losses[1] < losses[0] - 0.1, losses


@pytest.mark.parametrize(
    "settings,word",
    [
        (dict(svd_rank_ratio=0), "--svd_rank_ratio 0 must lie in (0, 1]"),
        (dict(svd_rank_ratio=1.5), "--svd_rank_ratio 1.5"),
        (dict(sparsity_ratio=1), "--sparsity_ratio 1 must lie in [0, 1)"),
        (dict(sparsity_ratio=-0.1), "--sparsity_ratio -0.1"),
        (dict(sparsity_ratio=0.9), "the core of ffn.key has 32"),
        (dict(sparsity_ratio=0.97), "leaves 16 hidden units"),
        (dict(samples=0), "--samples 0"),
        (dict(data="/nowhere"), "/nowhere"),
        (dict(out="in.pth"), "choose another name"),
    ],
    ids=str,
)
def test_bad_settings_are_named_and_nothing_is_written(file, settings, word):
    path = file("phantom of an rwkv7")
    out = path.with_name(settings.pop("out", "out.pth"))
    with pytest.raises(UserError) as error:
        compress_file(path, out, **settings)
    assert word in str(error.value) and "\n" not in str(error.value) and not path.with_name("out.pth").exists()


def test_what_cannot_work_is_said_before_the_work(file, capsys, monkeypatch):
    monkeypatch.setattr(measure, "load", lambda path: pytest.fail("the work has begun"))
    path = file("rwkv7")
    out, folder, before = path.with_name("out.pth"), path.parent, sorted(path.parent.rglob("*"))
    for flags, said in (
        (["--out", path / "x.pth"], f"--out {path / 'x.pth'} cannot be written: Not a directory; choose another place"),
        (["--out", "/proc/self/x.pth"], "--out /proc/self/x.pth cannot be written: "),
        (["--out", folder], f"--out {folder} is a folder; give the name of a file"),
        (["--out", path], "is the model itself, which would be lost; choose another name"),
        (["--out", out, "--report", path / "report.json"], "/report.json cannot be written: Not a directory; choose another place"),
        (["--out", out, "--svd_rank_ratio", 2], "--svd_rank_ratio 2.0 must lie in (0, 1]"),
        (["--out", out, "--sparsity_ratio", 1], "--sparsity_ratio 1.0 must lie in [0, 1)"),
        (["--out", out, "--sparsity_ratio", 0], "nothing to compress: give --svd_rank_ratio"),
    ):
        assert main(["compress", "--model", str(path), "--sparsity_ratio", "0.5", *map(str, flags)]) == 2
        assert said in capsys.readouterr().err and sorted(folder.rglob("*")) == before
    monkeypatch.undo()
    assert main(["compress", "--model", str(path), "--svd_rank_ratio", "0.5", "--out", str(folder / "new" / "folder" / "out.pth")]) == 0, (
        "a folder that does not exist is made"
    )


def test_bad_files_are_user_errors(file, capsys):
    path = file("rwkv7")
    save_weights(path, load_weights(path) | {"blocks.1.att.key.weight": torch.full((64, 64), torch.nan)})
    assert main(["compress", "--model", str(path), "--out", str(path.with_name("nan.pth")), "--svd_rank_ratio", "0.5"]) == 2
    assert "blocks.1.att.key has numbers that are not finite" in capsys.readouterr().err and not path.with_name("nan.pth").exists()


def test_a_factorised_rwkv7_does_not_become_ghosts(file):
    path = file("rwkv7")
    compress_file(path, path.with_name("out.pth"), 0.5)
    tensors = load_weights(path.with_name("out.pth"))
    with pytest.raises(UserError, match="cannot become a Ghost layer; use --core_ratio 1"):
        model_config("phantom", **SIZES, ranks=read_config(tensors).ranks)
    without = load_pretrained_rwkv7(path.with_name("out.pth"), RWKV7PhantomConfig(core_ratio=1, ttt_enabled=False)).eval()
    with torch.no_grad():
        assert torch.equal(without(IDX)[0], logits(path.with_name("out.pth"), IDX))
