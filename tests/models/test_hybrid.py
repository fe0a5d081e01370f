"""Hybrid: against a float64 model written from the formulas, every mode against every other, its files, its table and what it refuses."""

import pytest
import torch

from oracles import hybrid as oracle
from oracles import x070
from rwkvlm.checkpoint.pth import load_into, load_weights, save_weights
from rwkvlm.compress.run import compress_file
from rwkvlm.config import HybridConfig, ModelConfig, UserError
from rwkvlm.infer import load_engine
from rwkvlm.layers.attention import attend
from rwkvlm.models import adapted, build, costs, count_parameters, init_weights, param_groups, read_config
from rwkvlm.ops.cross_entropy import head_cross_entropy

SIZES = dict(n_layer=3, n_embd=64, vocab_size=37, head_size=16)
VARIANTS = {
    "whole context": dict(attention_layers="2"),
    "two of three, two groups": dict(attention_layers="1,2", attention_kv_heads=2),
    "window, one group": dict(attention_layers="1", attention_window=5, attention_kv_heads=1),
    "window of one token": dict(attention_layers="1", attention_window=1),
    "window as long as the text": dict(attention_layers="1/3", attention_window=19),
}

CHOOSING = [f"blocks.1.att.{name}" for name in ("x_q", "x_k", "query.weight", "key.weight", "scale")]


def alive(config, dtype=torch.float32, seed=0):
    """A model away from its initial values, whose attention tells tokens apart."""
    model = build(config).to(dtype)
    init_weights(model, seed)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g, dtype=torch.float64).to(dtype) / p.shape[-1] ** 0.5)
            if name.endswith("scale"):
                p.mul_(3)
    return model


def tokens(batch, length, seed=2):
    return torch.randint(SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_loss_and_every_gradient(variant):
    config = HybridConfig(**SIZES, **VARIANTS[variant])
    model, data = alive(config, torch.float64), tokens(2, 20)
    idx, targets = data[:, :-1], data[:, 1:]
    params = {n: t.detach().requires_grad_() for n, t in model.state_dict().items()}
    want = oracle.logits(params, idx, config.head_size, config.attention_window)
    want_loss, logit_grad = x070.loss_and_logit_gradient(want, targets)
    names = [name for name, _ in model.named_parameters()]
    want_grads = torch.autograd.grad(want, [params[n] for n in names], logit_grad)

    assert relative(model(idx).detach(), want.detach()) < 1e-10
    loss = head_cross_entropy(model.features(idx), model.head.weight, targets)
    assert abs(loss.item() - want_loss.item()) < 1e-10 * want_loss.item()
    loss.backward()
    for (name, p), grad in zip(model.named_parameters(), want_grads):
        if config.attention_window == 1 and name in CHOOSING:
            assert p.grad.abs().max() < 1e-15, f"{name}: whoever sees one token has no choice"
            continue
        assert grad.abs().max() > 0, name
        assert relative(p.grad, grad) < 1e-8, name


@pytest.mark.parametrize("pieces", [[1] * 37, [16, 16, 5], [3, 1, 33], [36, 1]], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_sequence_pieces_and_single_tokens_agree(variant, pieces):
    config = HybridConfig(**SIZES, **VARIANTS[variant])
    model, idx = alive(config).eval(), tokens(3, 37)
    with torch.no_grad():
        whole, end = model(idx, return_state=True)
        assert torch.equal(model(idx), whole)
        state, parts = model.init_state(3), []
        for piece in idx.split(pieces, dim=1):
            part, state = model(piece, state, return_state=True)
            parts.append(part)
    assert relative(torch.cat(parts, 1), whole) < 1e-5
    for layer, (got, want) in enumerate(zip(state, end)):
        if layer in config.attention:
            length = min(37, config.attention_window - 1) if config.attention_window else 37
            assert got.wkv.k.shape == want.wkv.k.shape == (3, config.attention_kv_heads, length, 16)
            assert got.wkv.k.untyped_storage().nbytes() == got.wkv.k.nbytes, "what the window has left behind is not kept"
            got, want = got.wkv, want.wkv
        for a, b in zip(got, want):
            assert a.numel() == 0 or relative(a, b) < 1e-4


@pytest.mark.parametrize("window", [0, 1, 2, 3, 7, 16, 31, 32, 50])
@pytest.mark.parametrize("before", [0, 1, 6])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_is_the_softmax_under_a_mask(window, before, groups):
    before = min(before, window - 1) if window else before
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, length, 8, generator=g, dtype=torch.float64)
        for heads, length in ((4, 32), (groups, 32 + before), (groups, 32 + before))
    )
    far = torch.arange(before, 32 + before)[:, None] - torch.arange(32 + before)
    hidden = (far < 0) | ((far >= window) if window else far > 99)
    scores = torch.einsum("bhtn,bhsn->bhts", q, k.repeat_interleave(4 // groups, 1)) / 8**0.5
    want = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v.repeat_interleave(4 // groups, 1)
    torch.testing.assert_close(attend(q, k, v, window), want)


def test_nothing_of_the_length_of_a_text_squared_is_made():
    """Without a window and without a past there is no mask; with one, masks are of the window."""
    made, arange = [], torch.arange

    def watched(*args, **how):
        made.append(args)
        return arange(*args, **how)

    q = torch.randn(1, 1, 300, 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "arange", watched)
        attend(q, q, q)
        assert not made
        attend(q, q, q, 16)
    assert made == [(32,)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing_changes_nothing_and_every_parameter_is_trained(variant):
    """DDP and ZeRO need the latter."""
    config, grads = HybridConfig(**SIZES, **VARIANTS[variant]), []
    for grad_cp in (False, True):
        model = alive(config)
        model.features(tokens(2, 24), grad_cp=grad_cp).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if not name.startswith("head.")})
    for name, grad in grads[0].items():
        assert grad is not None and torch.equal(grad, grads[1][name]), name


def test_bf16_runs_and_stays_near():
    model, idx = alive(HybridConfig(**SIZES, **VARIANTS["window, one group"])), tokens(2, 33)
    with torch.no_grad():
        want = model(idx)
        got, state = model.bfloat16()(idx, return_state=True)
        more, _ = model(idx[:, :1], state, return_state=True)
    assert got.dtype == more.dtype == torch.bfloat16 and state[1].wkv.k.dtype == torch.bfloat16
    assert ((got.float() - want).pow(2).mean() / want.pow(2).mean()).sqrt() < 0.05


@pytest.mark.parametrize("variant", VARIANTS)
def test_its_file_says_all_and_generates(tmp_path, variant):
    config = HybridConfig(**SIZES | dict(vocab_size=300), **VARIANTS[variant])
    model = alive(config)
    save_weights(tmp_path / "m.pth", model.state_dict())
    tensors = load_weights(tmp_path / "m.pth")
    assert read_config(tensors) == config
    assert count_parameters(tensors) == sum(p.numel() for p in model.parameters()) + sum(
        t.numel() for t in (model.blocks[0].att.v0, model.blocks[0].att.v1, model.blocks[0].att.v2)
    )
    engine = load_engine(tmp_path / "m.pth", device="cpu")
    ids, got = engine.tokenizer.encode("a"), list(engine.tokens("a", 12, temperature=0))
    with torch.no_grad():
        for token in got:
            logits = engine.model(torch.tensor([ids]))[0, -1]
            assert logits[token] > logits.max() - 1e-4
            ids.append(token)
    assert len(got) > 3


def test_initial_values_and_groups():
    """What is not as in RWKV-7, whose own table test_table.py holds to the official values."""
    model = build(HybridConfig(n_layer=4, n_embd=128, head_size=32, vocab_size=60, attention_kv_heads=2, attention_window=9))
    init_weights(model, 7)
    weights = model.state_dict()
    C = torch.arange(128, dtype=torch.float64) / 128
    for letter, power in dict(q=0.2, k=0.7, v=0.7, g=0.2).items():
        torch.testing.assert_close(weights[f"blocks.3.att.x_{letter}"].flatten().double(), 1 - C ** (power * 0.25), rtol=1e-6, atol=1e-6)
    for name, gain in (("query", 1.0), ("key", 1.0), ("value", 1.0), ("g2", 0.1)):
        matrix = weights[f"blocks.3.att.{name}" + ".weight" * (name != "g2")].double()
        gram = matrix @ matrix.T if len(matrix) <= 128 else matrix.T @ matrix
        torch.testing.assert_close(gram, gain**2 * torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=1e-5)
    assert weights["blocks.3.att.key.weight"].shape == (64, 128)
    torch.testing.assert_close(weights["blocks.3.att.scale"], torch.full((1, 1, 128), 8 / 32**0.5))
    assert not any(weights[f"blocks.3.att.{name}"].any() for name in ("output.weight", "g1"))
    gram = weights["blocks.2.att.key.weight"].double().square().sum(1)
    torch.testing.assert_close(gram, torch.full_like(gram, 0.01), rtol=0, atol=1e-6)  # RWKV-7's own keys stay small
    of = {name: (group["weight_decay"], group["my_lr_scale"]) for group in param_groups(model, 0.1) for name in group["names"]}
    assert of.keys() == dict(model.named_parameters()).keys()
    attention = {name.removeprefix("blocks.3.att."): how for name, how in of.items() if name.startswith("blocks.3.att.")}
    large = {f"{name}.weight" for name in ("query", "key", "value", "output")}
    assert attention == {
        name: (0.1 if name in large else 0.0, 2.0 if name == "scale" else 1.0)
        for name in large | {"x_q", "x_k", "x_v", "x_g", "g1", "g2", "scale"}
    }


def test_an_rwkv7_becomes_one():
    """All but the time mixing of the attention blocks is the file's; these begin as initial values, and add nothing at first."""
    plain = alive(ModelConfig(**SIZES))
    model = build(HybridConfig(**SIZES, attention_layers="2", attention_kv_heads=1))
    init_weights(model, 3)
    first = {name: t.clone() for name, t in model.state_dict().items()}
    kept = load_into(model, adapted(plain.state_dict(), model), partial=True)
    assert kept and all(name.startswith("blocks.2.att.") for name in kept)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, first[name] if name in kept else plain.state_dict()[name]), name
    other = build(model.config)
    assert load_into(other, adapted(model.state_dict(), other)) == [] and all(
        torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values())
    ), "a hybrid keeps its attention"
    with torch.no_grad():
        plain.blocks[2].att.output.weight.zero_()
        assert torch.equal(model(tokens(2, 9)), plain(tokens(2, 9)))
    with pytest.raises(UserError, match="lacks blocks.2.att.x_q .*use --load_partial 1"):
        load_into(model, adapted(plain.state_dict(), model))


BAD = {
    "block 0": (dict(attention_layers="0,2"), "--attention_layers 0,2 names block 0, which must be RWKV-7's"),
    "above": (dict(attention_layers="3"), "--attention_layers 3 names block 3, but --n_layer 3 has blocks 0 to 2"),
    "words": (dict(attention_layers="every 4th"), "--attention_layers 'every 4th' is neither numbers"),
    "all": (dict(attention_layers="1/1"), "--attention_layers 1/1 would take block 0 too"),
    "heads": (dict(attention_kv_heads=3), "--attention_kv_heads 3 does not divide the 4 heads"),
    "no heads": (dict(attention_kv_heads=-2), "--attention_kv_heads -2 does not divide"),
    "window": (dict(attention_window=-4), "--attention_window -4 must be at least 0"),
    "one block": (dict(n_layer=1), "needs at least 2 blocks, and --n_layer is 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_it_refuses(case):
    settings, said = BAD[case]
    with pytest.raises(UserError) as caught:
        HybridConfig(**SIZES | settings)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_which_blocks():
    def layers(n_layer, text):
        return HybridConfig(**SIZES | dict(n_layer=n_layer), attention_layers=text).attention

    assert [layers(n, "1/4") for n in (2, 4, 9, 12)] == [(1,), (3,), (3, 7), (3, 7, 11)]
    assert layers(6, "1/2") == (1, 3, 5) and layers(9, "5,2,5") == (2, 5)
    line = costs(HybridConfig(**SIZES, attention_kv_heads=2, attention_window=8))
    assert line == ["attention in block 2, 4 heads (2 of keys and values), window 8: 64 numbers more with each token, up to it"]


def test_damaged_and_foreign_files_are_named(tmp_path):
    tensors = dict(alive(HybridConfig(**SIZES)).state_dict())
    save_weights(tmp_path / "m.pth", tensors)
    with pytest.raises(UserError, match="holds a model of type hybrid; compress is made for x070 and phantom"):
        compress_file(tmp_path / "m.pth", tmp_path / "out.pth")
    with pytest.raises(UserError, match="blocks.2.att.key.weight has 63 rows, which are not whole heads of 16"):
        read_config(tensors | {"blocks.2.att.key.weight": torch.zeros(63, 64)})
    del tensors["blocks.2.att.key.weight"]
    with pytest.raises(UserError, match="is not a hybrid model: blocks.2.att.key.weight is missing"):
        read_config(tensors)
