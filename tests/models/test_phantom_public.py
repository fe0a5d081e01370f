"""rwkv7_ttt_phantom.py: the model's public face, as its readers call it."""

import copy
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from rwkv7_ttt_phantom import RWKV7PhantomConfig, create_model, load_pretrained_rwkv7, load_state, save_state, train_model
from rwkvlm.checkpoint.pth import save_weights
from rwkvlm.config import ModelConfig, PhantomConfig, TrainConfig, UserError
from rwkvlm.data.binidx import BinIdxWriter
from rwkvlm.models import build, init_weights
from rwkvlm.ops import backend

SMALL = dict(n_layer=2, n_embd=64, n_head=2, head_size=32, vocab_size=256, ttt_chunk=16)


@pytest.fixture(scope="module")
def model():
    model = create_model(RWKV7PhantomConfig(**SMALL), seed=1)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) / p.shape[-1] ** 0.5)
    return model


def rwkv7(folder, **sizes):
    model = build(ModelConfig(**dict(n_layer=2, n_embd=64, head_size=32, vocab_size=256) | sizes))
    init_weights(model, 3)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g) / p.shape[-1] ** 0.5)
            p.copy_(p.bfloat16())
    save_weights(folder / "rwkv7.pth", model.state_dict())
    return model.eval(), folder / "rwkv7.pth"


def test_defaults_are_those_of_the_readme():
    c = RWKV7PhantomConfig()
    assert (c.n_layer, c.n_embd, c.n_head, c.head_size, c.vocab_size, c.core_ratio, c.ghost_ratio) == (12, 768, 12, 64, 65536, 0.2, 0.8)
    assert (c.ttt_enabled, c.ttt_lr, c.ttt_steps, c.ttt_loss_weight, c.max_depth_iter) == (True, 0.01, 1, 0.1, 1)
    assert (c.use_svd_compression, c.svd_rank_ratio, c.use_sparsity, c.sparsity_ratio) == (False, 0.5, False, 0.3)
    assert (c.dropout, c.layer_norm_eps, c.use_cuda_kernel) == (0, 1e-5, True)
    assert c.sizes().ttt_chunk == 64 and c.sizes().ttt_core_ratio == 0.25 and c.sizes().ttt_second_order


def test_its_settings_and_the_flags_are_those_of_the_package():
    """Three lists of fields with defaults: one that is forgotten, or differs, is found here."""
    public, flags, own = ({f.name: f.default for f in fields(config)} for config in (RWKV7PhantomConfig, TrainConfig, PhantomConfig))
    sizes = {f.name for f in fields(ModelConfig)}
    for name, default in own.items():
        if name not in sizes | {"ghost_permuted", "core_ratio"}:  # how a file is stored; None there, for ghost_ratio may be given
            assert public[name] == default, name
        if name not in sizes | {"ghost_permuted"}:
            assert name in flags, name
    assert RWKV7PhantomConfig().core_ratio == own["core_ratio"]


def test_call_and_state(model, tmp_path, monkeypatch):
    idx = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))
    logits, state = model(idx)
    assert logits.shape == (2, 40, 256)
    assert torch.equal(model(idx, return_state=False), logits)
    first, state = model(idx[:, :21], model.init_state(2))
    save_state(tmp_path / "state.pt", state)
    with monkeypatch.context() as full, pytest.raises(OSError):
        full.setattr(torch, "save", lambda content, path: Path(path).write_bytes(b"half") and (_ for _ in ()).throw(OSError("no space")))
        save_state(tmp_path / "state.pt", model.init_state(2))
    second, _ = model(idx[:, 21:], load_state(tmp_path / "state.pt", model))
    assert torch.allclose(torch.cat([first, second], 1), logits, atol=1e-5 * logits.abs().max().item())
    rounded = copy.deepcopy(model).bfloat16()
    assert torch.allclose(
        rounded(idx[:, 21:], load_state(tmp_path / "state.pt", rounded))[0].float(), second, atol=0.1 * second.abs().max().item()
    )
    other = create_model(RWKV7PhantomConfig(**SMALL | dict(ttt_chunk=32)))
    with pytest.raises(UserError, match="state of another model"):
        load_state(tmp_path / "state.pt", other)
    save_weights(tmp_path / "weights.pth", model.state_dict())
    with pytest.raises(UserError, match="is no state"):
        load_state(tmp_path / "weights.pth", model)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "state.pt").read_bytes()[:500])
    (tmp_path / "text.pt").write_text("text")
    torch.save([torch.tensor(1.0)], tmp_path / "number.pt")
    for name, said in (
        ("cut.pt", "is truncated or no state"),
        ("text.pt", "is truncated or no state"),
        ("none.pt", "is no file"),
        ("number.pt", "of another model"),
    ):
        with pytest.raises(UserError, match=said):
            load_state(tmp_path / name, model)


def test_generate_reads_the_whole_prompt(model):
    prompt = torch.randint(256, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    got = model.generate(prompt, max_new_tokens=3, temperature=0)
    ids = list(prompt)
    with torch.no_grad():
        for token in got:
            logits = model(torch.tensor([ids]))[0][0, -1]
            assert logits[token] > logits.max() - 1e-4
            ids.append(token)
        changed = model(torch.tensor([[1 - (prompt[0] == 1), *prompt[1:]]]))[0][0, -1]
    assert len(got) == 3 and not torch.equal(changed, model(torch.tensor([prompt]))[0][0, -1])


def test_generate_forms_and_errors(model):
    assert len(model.generate([1, 2, 3])) == 20
    batch = torch.tensor([[1, 2], [3, 4]])
    out = model.generate(batch, max_new_tokens=4, temperature=0.8, top_p=0.9, top_k=50, seed=1)
    assert out.shape == (2, 4) and torch.equal(out, model.generate(batch, max_new_tokens=4, temperature=0.8, top_p=0.9, top_k=50, seed=1))
    assert model.generate([1], max_new_tokens=0) == []
    with pytest.raises(UserError, match="empty"):
        model.generate([])
    for token in (256, -1):
        with pytest.raises(UserError, match=f"the prompt has token {token}, but the model's vocabulary has 256"):
            model.generate(torch.tensor([[1, 2], [3, token]]))
    with pytest.raises(UserError, match="top_p"):
        model.generate([1], top_p=2)


def test_plain_pytorch_is_the_choice_of_one_model(monkeypatch):
    """Also in what checkpointing computes again; other models of the process keep the kernels."""
    choose, taken = backend.choose, []
    monkeypatch.setattr(backend, "choose", lambda *asked: taken.append(backend.requested()) or choose(*asked))
    idx = torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(0))
    plain, other = (create_model(RWKV7PhantomConfig(**SMALL, use_cuda_kernel=kernel)).train() for kernel in (False, True))
    for model, asked in ((plain, "torch"), (other, ""), (copy.deepcopy(plain), "torch")):
        taken.clear()
        model.features(idx, grad_cp=True).square().sum().backward()
        assert set(taken) == {asked}
    assert backend.requested() == ""


def test_generated_tokens_can_be_trained_on(model):
    tokens = model.generate(torch.tensor([[1, 2]]), max_new_tokens=5, seed=0)
    model(tokens, return_state=False).sum().backward()
    assert model.emb.weight.grad is not None
    model.zero_grad()


@pytest.mark.parametrize("kind", ["state", "memory"])
def test_switched_off_it_has_rwkv7s_logits_to_the_bit(tmp_path, kind):
    plain, path = rwkv7(tmp_path, dim_ffn=192, rank_w=16)
    model = load_pretrained_rwkv7(path, RWKV7PhantomConfig(core_ratio=1, ttt_enabled=False, ttt_kind=kind)).eval()
    idx = torch.randint(256, (2, 75), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(idx)[0], plain(idx))


def test_rwkv7_with_ghosts_and_steps(tmp_path):
    plain, path = rwkv7(tmp_path)
    idx = torch.randint(256, (1, 40), generator=torch.Generator().manual_seed(0))
    errors = {}
    with torch.no_grad():
        for ratio in (0.25, 0.5, 0.875):
            model = load_pretrained_rwkv7(path, RWKV7PhantomConfig(core_ratio=ratio, ttt_chunk=16)).eval()
            logits = model(idx)[0]
            errors[ratio] = ((logits - plain(idx)).norm() / plain(idx).norm()).item()
            save_weights(tmp_path / "phantom.pth", model.state_dict())
            again = load_pretrained_rwkv7(tmp_path / "phantom.pth").eval()
            assert ((again(idx)[0] - logits).norm() / logits.norm()) < 0.02, "bfloat16 only"
    assert errors[0.25] > errors[0.5] > errors[0.875]
    with pytest.raises(UserError, match="identity"):
        load_pretrained_rwkv7(path, RWKV7PhantomConfig(ghost_activation="relu"))


@pytest.mark.parametrize(
    "bad,word",
    [
        (dict(core_ratio=0.3, ghost_ratio=0.6), "do not sum to 1"),
        (dict(n_head=5), "n_head 5 times head_size 64 is not n_embd 768"),
        (dict(core_ratio=0), "core_ratio"),
        (dict(ttt_chunk=30), "multiple of 16"),
        (dict(ttt_steps=0), "ttt_steps"),
        (dict(svd_rank_ratio=0), "svd_rank_ratio"),
        (dict(sparsity_ratio=1.5), "sparsity_ratio"),
    ],
)
def test_bad_settings(bad, word):
    with pytest.raises(UserError, match=word):
        RWKV7PhantomConfig(**bad)
    assert RWKV7PhantomConfig(ghost_ratio=0.6).core_ratio == pytest.approx(0.4)
    assert RWKV7PhantomConfig(core_ratio=0.3, ghost_ratio=0.7).core_ratio == 0.3


def test_train_model(tmp_path):
    walk = np.cumsum(np.random.default_rng(0).integers(0, 7, 8000)) % 256
    with BinIdxWriter(tmp_path / "data", np.uint16) as writer:
        writer.add(walk.astype(np.uint16))
    flags = dict(
        ctx_len=32, micro_bsz=4, my_exit_tokens=12 * 4 * 32, epoch_samples=24, lr_init=3e-3, accelerator="cpu", precision="fp32",
        kernel="torch", random_seed=1, enable_progress_bar=False,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="max_steps"):  # and no model: the one that is there is the initial one
        train_model(tmp_path / "data", tmp_path / "out", RWKV7PhantomConfig(**SMALL), **flags, max_steps=2)
    model = train_model(tmp_path / "data", tmp_path / "out", RWKV7PhantomConfig(**SMALL), **flags)
    assert not (tmp_path / "out" / "rwkv-compressed.pth").exists()
    assert backend.requested() == "", "kernel is what the run asked for, not what the process does from now on"
    smaller = RWKV7PhantomConfig(**SMALL, use_svd_compression=True, use_sparsity=True)
    compressed = train_model(tmp_path / "data", tmp_path / "out", smaller, **flags)
    assert (tmp_path / "out" / "rwkv-final.pth").exists() and model.config.ttt_chunk == 16
    sizes = [path.stat().st_size for path in ((tmp_path / "out" / f"rwkv-{name}.pth") for name in ("final", "compressed"))]
    assert sizes[1] < sizes[0] and compressed.config.dim_ffn == 176 and compressed.config.ranks and not model.config.ranks
    assert len(compressed.generate([1, 2, 3], max_new_tokens=2)) == 2
    idx = torch.tensor(walk[:65])[None]
    fresh = create_model(RWKV7PhantomConfig(**SMALL))
    with torch.no_grad():
        losses = [torch.nn.functional.cross_entropy(m.eval()(idx[:, :-1])[0][0], idx[0, 1:]).item() for m in (model, fresh)]
    assert losses[0] < losses[1] - 0.3, losses
    # nothing is left to do: the model that is there
    train_model(tmp_path / "data", tmp_path / "out", RWKV7PhantomConfig(**SMALL), **flags, max_steps=2)
    with pytest.raises(RuntimeError, match="max_steps"):  # longer, and not to its end: rwkv-final.pth is not what was just trained
        train_model(
            tmp_path / "data", tmp_path / "out", RWKV7PhantomConfig(**SMALL), **flags | dict(my_exit_tokens=24 * 4 * 32), max_steps=2
        )


@pytest.mark.parametrize("code, words", [(1, "memory ran out"), (143, "stopped by SIGTERM")])
def test_train_model_says_why_training_ended_early(tmp_path, monkeypatch, code, words):
    from rwkvlm.train import run

    monkeypatch.setattr(run, "run", lambda config: code)
    with pytest.raises(RuntimeError, match=words):
        train_model(tmp_path / "data", tmp_path / "out", RWKV7PhantomConfig(**SMALL))


def test_example_of_its_docstring_runs_outside_the_checkout(tmp_path):
    root = Path(__file__).resolve().parents[2] / "RWKV-v7"
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r}); import torch; from rwkv7_ttt_phantom import create_model, RWKV7PhantomConfig as C;"
        "m = create_model(C(n_layer=1, n_embd=64, n_head=1, vocab_size=100, use_cuda_kernel=False)); "
        "x, s = m(torch.tensor([[1, 2, 3]])); print(x.shape[-1], len(m.generate([1, 2, 3])))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == "100 20\n", done.stderr
