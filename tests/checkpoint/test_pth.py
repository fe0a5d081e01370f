import sys
import zipfile

import pytest
import torch

from rwkvlm import models
from rwkvlm.checkpoint.gather import full_weights
from rwkvlm.checkpoint.pth import load_into, load_weights, model_from, newest_weights, save_weights
from rwkvlm.config import ModelConfig, UserError, model_config

SIZES = ModelConfig(n_layer=2, n_embd=64, vocab_size=50, head_size=16, dim_ffn=96, rank_w=8, rank_a=12, rank_v=20, rank_g=24)


ATT = ["x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w1", "w2", "w0", "a1", "a2", "a0", "v1", "v2", "v0", "g1", "g2", "k_k", "k_a", "r_k"]
ATT += [f"{name}.weight" for name in ("receptance", "key", "value", "output", "ln_x")] + ["ln_x.bias"]
BLOCK = [
    *(f"{norm}.{part}" for norm in ("ln1", "ln2", "ln0") for part in ("weight", "bias")),
    *(f"att.{x}" for x in ATT),
    "ffn.x_k",
    "ffn.key.weight",
    "ffn.value.weight",
]
OFFICIAL_ORDER = [
    "emb.weight",
    *(f"blocks.{i}.{name}" for i in (0, 1) for name in BLOCK if i == 0 or "ln0" not in name),
    "ln_out.weight",
    "ln_out.bias",
    "head.weight",
]


def build(config=SIZES, seed=0):
    model = models.build(config)
    models.init_weights(model, seed)
    return model


@pytest.fixture
def file(tmp_path):
    save_weights(tmp_path / "rwkv-3.pth", full_weights(build()))
    return tmp_path / "rwkv-3.pth"


def one_line(caught) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_round_trip_is_the_official_format_and_order(file):
    tensors = load_weights(file)
    model = build()
    assert list(tensors) == OFFICIAL_ORDER
    for name, tensor in model.state_dict().items():
        assert tensors[name].dtype == torch.bfloat16
        assert torch.equal(tensors[name], tensor.bfloat16()), name
    other = build(seed=1)
    assert load_into(other, tensors) == []
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, tensors[name].float()), name
    assert models.read_config(tensors) == SIZES


def test_what_is_to_be_written_does_not_follow_the_model():
    """It is written beside the training, which changes a bf16 model in place."""
    model = build().bfloat16()
    weights = full_weights(model)
    before = weights["head.weight"].clone()
    with torch.no_grad():
        model.head.weight.zero_()
    assert before.any() and torch.equal(weights["head.weight"], before)


def test_views_are_written_without_the_memory_behind_them(tmp_path):
    big = torch.zeros(1 << 20, dtype=torch.bfloat16)
    save_weights(tmp_path / "a.pth", {"x": big[:4]})
    assert (tmp_path / "a.pth").stat().st_size < 4096


def test_config_of_one_layer_without_the_unused_tensors():
    config = ModelConfig(n_layer=1, n_embd=64, vocab_size=50, head_size=32)
    tensors = full_weights(build(config))
    for name in ("v0", "v1", "v2"):
        del tensors[f"blocks.0.att.{name}"]
    assert models.read_config(tensors) == config
    assert load_into(build(config), tensors) == [f"blocks.0.att.{v}" for v in ("v0", "v1", "v2")]


@pytest.mark.parametrize("config", [SIZES, model_config("x040", n_layer=2, n_embd=64, vocab_size=50)], ids=lambda config: config.model_type)
def test_ones_in_front_of_a_shape_do_not_count(config):
    """Some tools make [C] of the official [1, 1, C]; a transposed matrix is another one all the same."""
    model = build(config)
    tensors = full_weights(model)
    squeezed = {name: tensor.squeeze() for name, tensor in tensors.items()}
    assert sum(squeezed[name].shape != tensor.shape for name, tensor in tensors.items()) > 2
    loaded = model_from(squeezed, "cpu", torch.float32)
    assert all(torch.equal(tensor, tensors[name].float()) for name, tensor in loaded.state_dict().items())
    assert load_into(build(config, seed=1), {name: tensor[None] if tensor.dim() == 1 else tensor for name, tensor in tensors.items()}) == []
    with pytest.raises(UserError, match=r"ffn.key.weight has shape \["):
        load_into(model, tensors | {"blocks.0.ffn.key.weight": tensors["blocks.0.ffn.key.weight"].T})


@pytest.mark.parametrize("prefix", ["_forward_module.", "module.", "_forward_module.module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_dropped(tmp_path, prefix):
    torch.save({prefix + name: tensor for name, tensor in full_weights(build()).items()}, tmp_path / "a.pth")
    assert list(load_weights(tmp_path / "a.pth")) == list(build().state_dict())


def test_a_failed_save_leaves_the_old_file_and_nothing_else(file, monkeypatch):
    before = file.read_bytes()

    def no_rename(source, target):
        assert not source.name.endswith(".pth") and zipfile.is_zipfile(source)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", no_rename)
    with pytest.raises(UserError, match="No space left on device") as caught:
        save_weights(file, full_weights(build(seed=5)))
    one_line(caught)
    assert file.read_bytes() == before and [p.name for p in file.parent.iterdir()] == [file.name]


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write") as caught:
        save_weights(tmp_path / "file" / "rwkv-1.pth", {"x": torch.zeros(1)})
    one_line(caught)


def damage_cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_empty(path):
    path.write_bytes(b"")


def damage_text(path):
    path.write_text("not a checkpoint\n")


def damage_code(path):
    torch.save({"x": damage_text}, path)


def damage_list(path):
    torch.save([torch.zeros(2)], path)


def damage_nested(path):
    torch.save({"model": {"emb.weight": torch.zeros(2)}}, path)


def damage_integers(path):
    torch.save({"emb.weight": torch.zeros(2, dtype=torch.int64)}, path)


def damage_other_text(path):
    path.write_text("abc" * 1000)  # torch: IndexError


def damage_json(path):
    path.write_text('{"text": "a line of training data"}\n' * 100)


def damage_bytes(path):
    path.write_bytes(bytes(range(256)) * 40)


@pytest.mark.parametrize(
    "damage",
    [
        damage_cut,
        damage_empty,
        damage_text,
        damage_other_text,
        damage_json,
        damage_bytes,
        damage_code,
        damage_list,
        damage_nested,
        damage_integers,
    ],
)
def test_files_that_are_no_weights(file, damage):
    damage(file)
    with pytest.raises(UserError, match=str(file)) as caught:
        load_weights(file)
    one_line(caught)


def test_missing_file_and_folder(tmp_path):
    for path, what in ((tmp_path / "none.pth", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=what) as caught:
            load_weights(path)
        one_line(caught)


@pytest.mark.skipif(sys.platform == "darwin", reason="no file has such a name there")
def test_a_name_that_is_not_utf_8(file):
    with pytest.raises(UserError, match="is not UTF-8; rename it") as caught:
        load_weights(file.rename(file.with_name("\udce9.pth")))
    one_line(caught)


def test_other_models_are_refused():
    tensors = full_weights(build())
    for change, what in (
        ({"blocks.0.att.r_k": None}, "blocks.0.att.r_k is missing"),
        ({"blocks.0.att.r_k": torch.zeros(4, 8)}, "does not fit"),
        ({"emb.weight": torch.zeros(4)}, "dimensions"),
        ({name: None for name in tensors if name.startswith("blocks.0.")}, "its blocks are"),
    ):
        changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        with pytest.raises(UserError, match=what) as caught:
            models.read_config(changed)
        one_line(caught)


def test_load_into_names_the_first_problem_and_changes_nothing():
    tensors = full_weights(build())
    model = build(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrong = {**tensors, "blocks.1.att.w1": torch.zeros(64, 9)}
    unknown = {**tensors, "blocks.2.ln1.weight": torch.zeros(64)}
    missing = {name: tensor for name, tensor in tensors.items() if name != "blocks.1.ffn.x_k"}
    used = {name: tensor for name, tensor in tensors.items() if name != "blocks.1.att.v0"}
    for bad, what in (
        (wrong, r"blocks.1.att.w1 has shape \[64, 9\]"),
        (unknown, "blocks.2.ln1.weight is unknown"),
        (missing, "lacks blocks.1.ffn.x_k"),
        (used, "lacks blocks.1.att.v0"),
    ):
        with pytest.raises(UserError, match=what) as caught:
            load_into(model, bad)
        one_line(caught)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(
        UserError,
        match="^the checkpoint lacks blocks.1.ffn.x_k .1 missing in all.: it is damaged, "
        "or of a model that is not known here; give another one$",
    ):
        model_from(missing, "cpu", torch.float32)  # which generate, evaluate and compress read: none of them has --load_partial
    assert load_into(model, missing, partial=True) == ["blocks.1.ffn.x_k"]
    assert torch.equal(model.blocks[1].ffn.x_k, before["blocks.1.ffn.x_k"])
    assert torch.equal(model.head.weight, tensors["head.weight"].float())


def test_newest_weights_scans_as_officially(tmp_path):
    assert newest_weights(tmp_path) is None
    for name in ("rwkv-final.pth", ".rwkv-12.pth.tmp", "rwkv-x.pth", "other-20.pth"):
        (tmp_path / name).touch()
    assert newest_weights(tmp_path) is None
    (tmp_path / "rwkv-init.pth").touch()
    assert newest_weights(tmp_path) == (tmp_path / "rwkv-init.pth", -1)
    for n in (0, 9, 10):
        (tmp_path / f"rwkv-{n}.pth").touch()
    assert newest_weights(tmp_path) == (tmp_path / "rwkv-10.pth", 10)
    assert newest_weights(tmp_path, [tmp_path / "rwkv-10.pth"]) == (tmp_path / "rwkv-9.pth", 9)
