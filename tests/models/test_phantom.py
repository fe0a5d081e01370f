"""Phantom: every mode against every other, RWKV-7 inside it to the bit, its files, its table and what it refuses."""

import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rwkvlm.checkpoint.pth import load_into, load_weights, save_weights
from rwkvlm.config import ModelConfig, PhantomConfig, UserError, model_config
from rwkvlm.config.phantom import CARRIED, MATRICES, decode, encode
from rwkvlm.infer import Engine
from rwkvlm.models import adapted, build, count_parameters, init_weights, param_groups, read_config
from rwkvlm.models.phantom import costs

SIZES = dict(n_layer=2, n_embd=64, vocab_size=37, head_size=32)
VARIANTS = {
    "default, segments of 64": {},
    "segments of 16": dict(ttt_chunk=16),
    "three steps, ghosts with ReLU": dict(ttt_chunk=16, ttt_steps=3, ghost_activation="relu"),
    "two passes": dict(ttt_chunk=16, max_depth_iter=2),
    "two passes, segments of 64": dict(max_depth_iter=2),
    "values as targets, no head": dict(ttt_chunk=32, ttt_target="value", ttt_head=False, core_ratio=1.0),
    "ghosts only": dict(ttt_enabled=False),
    "memory": dict(ttt_kind="memory"),
    "memory, narrow": dict(ttt_kind="memory", ttt_features=32),
    "memory, two passes": dict(ttt_kind="memory", max_depth_iter=2),
}
SLOW = ("two passes, segments of 64", "memory, two passes")
EXACT = 2e-5  # far below what a step does (test_a_step_changes_what_comes_after_it_and_only_that)
OFF = dict(core_ratio=1.0, ttt_enabled=False)


def alive(config, dtype=torch.float32, seed=0):
    """A model away from its initial values, with keys and steps so large that what a step does is seen in the logits."""
    model = build(config).to(dtype)
    init_weights(model, seed)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g, dtype=torch.float64).to(dtype) / p.shape[-1] ** 0.5)
        for name, p in model.named_parameters():
            if name.endswith(("att.key.weight", "att.key.core.weight")):
                p.mul_(8)
            elif name.endswith("ttt.rate"):
                p.fill_(0.2)
            elif name.endswith("ttt.gain"):
                p.fill_(5.0)
    return model.eval()


def tokens(batch, length, seed=2):
    return torch.randint(SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item()


def leaves(state):
    if isinstance(state, torch.Tensor):
        return [state]
    return [leaf for part in state if part is not None for leaf in leaves(part)]


def rows_of(state, make):
    """A state whose tensors are make(tensor), of the same structure."""
    if state is None or isinstance(state, torch.Tensor):
        return state if state is None else make(state)
    parts = [rows_of(part, make) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else parts


def joined(states):
    """States of single sequences as the state of a batch."""
    flat = zip(*(leaves(state) for state in states))
    batch = iter([torch.cat(tensors) for tensors in flat])
    return rows_of(states[0], lambda _: next(batch))


@pytest.mark.parametrize(
    "variant,more", [("segments of 16", 0), *(pytest.param(v, 11, marks=[pytest.mark.slow] * (v in SLOW)) for v in VARIANTS)]
)
def test_whole_sequence_pieces_and_single_tokens_agree(variant, more):
    model = alive(model_config("phantom", **SIZES, **VARIANTS[variant]))
    segment = model.config.ttt_chunk
    length = segment * (1 if segment == 64 else 2) + more
    idx = tokens(2, length)
    with torch.no_grad():
        whole, end = model(idx, return_state=True)
        assert relative(model(idx), whole) == 0
        for pieces in ([1] * length, [16, length - 16], [3, 1, 25, length - 29], [length - 1, 1]):
            state, parts = model.init_state(2), []
            for piece in idx.split(pieces, dim=1):
                part, state = model(piece, state, return_state=True)
                parts.append(part)
            assert relative(torch.cat(parts, 1), whole) < EXACT, pieces
            for block, want in zip(state, end):
                for one, other in zip(block, want):
                    assert relative(one.att_x, other.att_x) < 1e-4
                    wkv, wkv_want = (getattr(s.wkv, "wkv", s.wkv) for s in (one, other))
                    assert relative(wkv, wkv_want) < 1e-4
                    if model.config.has_memory:
                        assert relative(one.wkv.fast, other.wkv.fast) < 1e-4


@pytest.mark.parametrize("variant", ["segments of 16", "two passes, segments of 64", "memory", "memory, narrow"])
def test_sequences_at_different_positions_in_one_batch(variant):
    model = alive(model_config("phantom", **SIZES, **VARIANTS[variant]))
    segment = VARIANTS[variant].get("ttt_chunk", 64)
    starts, more = (3, 31, 64, 70), segment + 16
    texts = [tokens(1, start + more, seed) for seed, start in enumerate(starts)]
    with torch.no_grad():
        states = [model(text[:, :start], return_state=True)[1] for text, start in zip(texts, starts)]
        together = torch.cat([text[:, start:] for text, start in zip(texts, starts)])
        want = torch.cat([model(text)[:, start:] for text, start in zip(texts, starts)])
        for pieces in ([more], [1] * more, [7, 13, more - 20]):
            state, parts = joined(states), []
            for piece in together.split(pieces, dim=1):
                part, state = model(piece, state, return_state=True)
                parts.append(part)
            assert relative(torch.cat(parts, 1), want) < EXACT, pieces


@pytest.mark.parametrize("variant, first", [("segments of 16", 16), ("memory", 0)])
def test_a_step_changes_what_comes_after_it_and_only_that(variant, first):
    settings = dict(SIZES, core_ratio=1.0, **VARIANTS[variant])
    model, idx = alive(model_config("phantom", **settings)), tokens(2, 48)
    with torch.no_grad():
        before = model(idx)
        for name, p in model.named_parameters():
            if name.endswith("ttt.rate"):
                p.fill_(-30.0)  # a step of size zero
        after = model(idx)
    assert first == 0 or relative(after[:, :first], before[:, :first]) == 0
    assert relative(after[:, first : first + 16], before[:, first : first + 16]) > 20 * EXACT


@pytest.mark.parametrize("kind", ["state", "memory"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_switched_off_it_is_rwkv7_to_the_bit(tmp_path, kind, dtype):
    plain = alive(ModelConfig(**SIZES), dtype)
    phantom = build(model_config("phantom", **SIZES, **OFF, ttt_kind=kind)).to(dtype).eval()
    assert list(phantom.state_dict()) == list(plain.state_dict())
    load_into(phantom, plain.state_dict())
    idx = tokens(2, 75)
    with torch.no_grad():
        assert torch.equal(phantom(idx), plain(idx))
        got, state = phantom(idx[:, :40], return_state=True)
        want, state_want = plain(idx[:, :40], return_state=True)
        assert torch.equal(got, want)
        assert torch.equal(phantom(idx[:, 40:], state), plain(idx[:, 40:], state_want))
    first, second = build(ModelConfig(**SIZES)), build(model_config("phantom", **SIZES, **OFF))
    for model in (first, second):
        init_weights(model, 5)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    save_weights(tmp_path / "m.pth", phantom.state_dict())
    assert read_config(load_weights(tmp_path / "m.pth")) == ModelConfig(**SIZES)


def test_the_value_of_the_first_pass_is_the_one_that_is_mixed_in():
    model, idx = alive(PhantomConfig(**SIZES, **OFF, max_depth_iter=2)), tokens(2, 20)
    first, second = model.blocks
    with torch.no_grad():
        x, v, _ = first.mix(first.ln0(model.emb(idx)), None)
        x, other, _ = first.mix(x, v)
        assert not torch.equal(v, other)
        for _ in range(2):
            x, _, _ = second.mix(x, v)
        assert torch.equal(model.head(model.ln_out(x)), model(idx))


def test_gradients_are_those_of_rwkv7_when_switched_off():
    grads = []
    for config in (ModelConfig(**SIZES), model_config("phantom", **SIZES, **OFF)):
        model = alive(config).train()
        x, terms = model.for_training(tokens(2, 30))
        model.head(x).square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        assert terms == {}
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_trained(variant):
    """DDP and ZeRO need this; grad_cp changes nothing."""
    config = model_config("phantom", **SIZES, **VARIANTS[variant])
    idx, found = tokens(2, 80), []
    for grad_cp in (False, True):
        model = alive(config).train()
        x, terms = model.for_training(idx, grad_cp)
        (model.head(x).square().mean() + sum(w * t for w, t in terms.values())).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in found[0].items():
        assert grad is not None and grad.abs().max() > 0, name
        assert relative(found[1][name], grad) < 1e-5, name


def test_gradients_against_finite_differences_of_the_whole_model():
    """Float64, through two segments, of what only TTT has and of what it reads."""
    model = alive(model_config("phantom", **(SIZES | dict(n_layer=1)), ttt_chunk=16, ttt_target="value"), torch.float64)
    idx, g = tokens(1, 40), torch.Generator().manual_seed(0)

    def loss():
        return model(idx)[:, 16:].square().mean()

    loss().backward()
    for name, p in model.named_parameters():
        # what the targets do not depend on
        if ".ttt." in name or name.endswith(("att.k_k", "att.w0", "att.a0", "att.x_k", "att.key.core.weight")):
            direction, eps = torch.randn(p.shape, generator=g, dtype=torch.float64), 1e-6
            with torch.no_grad():
                values = []
                for sign in (1, -1):
                    p.add_(sign * eps * direction)
                    values.append(loss())
                    p.sub_(sign * eps * direction)
            slope, want = (p.grad * direction).sum(), (values[0] - values[1]) / (2 * eps)
            assert math.isclose(slope, want, rel_tol=1e-5, abs_tol=1e-9), name


def test_memory_of_the_state_is_constant():
    for variant in ("default, segments of 64", "memory"):
        model = alive(model_config("phantom", **SIZES, **VARIANTS[variant]))
        with torch.inference_mode():
            state = model.init_state(1)
            sizes = sorted(leaf.nbytes for leaf in leaves(state))
            for at in range(0, 10_000, 1250):
                _, state = model(tokens(1, 1249, at), state, return_state=True)
                logits, state = model(tokens(1, 1, at), state, return_state=True)
                assert sorted(leaf.untyped_storage().nbytes() for leaf in leaves(state)) <= [2 * s + 2**14 for s in sizes]
                assert sorted(leaf.nbytes for leaf in leaves(state)) == sizes
            assert torch.isfinite(logits).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_says_all_that_the_model_is(tmp_path, variant):
    config = model_config(
        "phantom",
        **SIZES,
        **VARIANTS[variant],
        ttt_loss_weight=0.5,
        dropout=0.1,
        layer_norm_eps=1e-4,
        core_ratios="ffn.key=1,att.output=0.5",
    )
    model = alive(config)
    save_weights(tmp_path / "m.pth", model.state_dict())
    tensors = load_weights(tmp_path / "m.pth")
    again = build(read_config(tensors)).eval()
    load_into(again, tensors)
    assert again.config == config.with_(ttt_loss_weight=0.1, dropout=0.0), "what only training needs is not in the file"
    assert {module.eps for module in again.modules() if isinstance(module, torch.nn.LayerNorm)} == {1e-4}
    with torch.no_grad():
        assert torch.equal(again(tokens(1, 70)), _rounded(model)(tokens(1, 70)))


@pytest.mark.parametrize(
    "training", [dict(ttt_second_order=False), dict(ttt_second_order=False, ttt_meta=True), dict(ttt_head=False)], ids=str
)
def test_a_file_loads_however_it_was_trained(tmp_path, training):
    """Without derivatives through the step nothing trains a prediction head: the file has none, and says so."""
    model = alive(model_config("phantom", **SIZES, ttt_chunk=16, **training))
    save_weights(tmp_path / "m.pth", model.state_dict())
    tensors = load_weights(tmp_path / "m.pth")
    again = build(read_config(tensors)).eval()
    load_into(again, tensors)
    with torch.no_grad():
        assert torch.equal(again(tokens(1, 40)), _rounded(model)(tokens(1, 40)))


def _rounded(model):
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    return model


def test_what_a_file_carries_survives_every_format():
    config = PhantomConfig(**SIZES, core_ratio=1 / 3, ttt_lr=0.0123456789, core_ratios="ffn.key=1")
    numbers = torch.tensor(encode(config), dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert decode(numbers.to(dtype).tolist()) == config.carried()
    for damaged in (numbers + 1, numbers[:100], torch.full((512,), torch.nan)):
        with pytest.raises(UserError, match="phantom_config cannot be read"):
            decode(damaged.tolist())


def test_files_of_before_the_present_memory():
    """They carry the sizes of one that is gone: steps on the state mean what they meant, that memory is refused."""
    config = PhantomConfig(**SIZES)
    then = {name: value for name, value in config.carried().items() if name != "ttt_features"} | {"memory_dim": 32, "memory_rows": 32}
    assert model_config("phantom", **SIZES, **decode(json.dumps(then).encode())) == config
    with pytest.raises(UserError, match="until November 2026"):
        decode(json.dumps(then | {"ttt_kind": "memory"}).encode())
    decode(json.dumps(then | {"ttt_kind": "memory", "ttt_enabled": False}).encode())  # Ghosts alone


@pytest.mark.parametrize("text", ["11", "null", "true", "[]", '"x"', '{"no_such":1}', '{"memory_dim":1'])
def test_what_no_version_carried_is_refused(text):
    with pytest.raises(UserError, match="phantom_config cannot be read"):
        decode(text.encode())


def test_rwkv7_becomes_a_phantom_with_the_least_error():
    config = ModelConfig(**SIZES, dim_ffn=192)
    plain = alive(config)
    phantom = build(model_config("phantom", **SIZES, dim_ffn=192, core_ratio=0.25, ghost_permuted=True))
    init_weights(phantom, 0)
    load_into(phantom, adapted(plain.state_dict(), phantom))
    for block in range(2):
        for name in MATRICES:
            weight = plain.get_submodule(f"blocks.{block}.{name}").weight.detach()
            module = phantom.get_submodule(f"blocks.{block}.{name}")
            rows = phantom.config.core_rows(name)
            with torch.no_grad():
                rebuilt = module(torch.eye(weight.shape[1])).T
            best = torch.linalg.svdvals(weight.double())[rows:].norm() if rows else torch.zeros(())
            assert abs((rebuilt - weight).norm() - best) <= 1e-5 * weight.norm(), name
    new = build(phantom.config)
    init_weights(new, 0)
    for name, tensor in new.state_dict().items():
        if ".ttt." in name or name == CARRIED:
            assert torch.equal(phantom.state_dict()[name], tensor), name


def test_what_a_phantom_has_besides_begins_as_in_a_new_one():
    plain, model = alive(ModelConfig(**SIZES)), build(PhantomConfig(**SIZES, ttt_kind="memory", ghost_permuted=True))
    init_weights(model, 5)
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert load_into(model, adapted(plain.state_dict(), model)) == [], "nothing is missing"
    assert all(torch.equal(tensor, first[name]) for name, tensor in model.state_dict().items() if ".ttt." in name or name == CARRIED)


def test_core_rows_follow_the_ratios_and_never_cost_more():
    config = PhantomConfig(n_embd=768, n_layer=1)
    assert {name: config.core_rows(name) for name in MATRICES} == dict.fromkeys(MATRICES, 152) | {"ffn.key": 616}
    assert PhantomConfig(n_embd=768, core_ratio=0.25).core_rows("ffn.key") == 0, "it would save nothing"
    some = PhantomConfig(n_embd=768, core_ratio=1.0, core_ratios="att.key=0.5,ffn.value=0.1")
    assert [some.core_rows(name) for name in MATRICES] == [0, 384, 0, 0, 0, 80]
    for ratio in (0.05, 0.2, 0.24, 0.5, 0.99):
        c = PhantomConfig(n_embd=256, core_ratio=ratio)
        for name in MATRICES:
            inputs, outputs = c.matrix_shape(name)
            rows = c.core_rows(name)
            assert rows * (inputs + outputs - rows) < inputs * outputs


def test_the_table_of_costs_counts_what_the_model_has():
    config = PhantomConfig(n_embd=256, n_layer=2, head_size=64, vocab_size=100)
    with torch.device("meta"):
        model = build(config)
    held = sum(
        p.numel() for name, p in model.named_parameters() if name.startswith("blocks.1.") and (".core." in name or ".ghost." in name)
    )
    lines = costs(config)
    assert f"-> {held:,} " in lines[-2] and f"{2 * held:,}" in lines[-2] and len(lines) == 9
    assert "16%" in next(line for line in costs(PhantomConfig(n_embd=768)) if line.startswith("ffn.key"))
    assert costs(PhantomConfig(n_embd=768, core_ratio=1.0, ttt_enabled=False)) == []
    assert costs(PhantomConfig(n_embd=768, core_ratio=1.0)) == lines[-1:]
    assert lines[-1] == "state: 1 step of test-time training after every 64 tokens, on 25% of its rows"
    assert count_parameters(model) == sum(t.numel() for name, t in model.state_dict().items() if name != CARRIED)


@pytest.mark.parametrize("core_ratio", [1.0, 0.2])
def test_the_table_of_costs_has_the_memory(core_ratio):
    config = PhantomConfig(n_layer=1, n_embd=64, head_size=16, vocab_size=8, core_ratio=core_ratio, ttt_kind="memory", ttt_features=32)
    memory = alive(config).blocks[0].att.ttt
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        memory._features(torch.randn(1, 32, 8, 16))  # of queries and keys in four heads; four products with the fast weights are as many
    line = costs(config)[-1]
    assert line.startswith("memory: 32 features of each key, ")
    assert f" {sum(p.numel() for p in memory.parameters()):,} parameters and {2 * counter.get_total_flops() // 32:,} FLOPs/token" in line


def test_initial_values_keep_the_scale_of_rwkv7():
    """A ghost layer's outputs are as large at the start as those of the matrix that it stands for."""
    config = dict(n_layer=1, n_embd=256, vocab_size=50, head_size=64)
    plain, ghost = build(ModelConfig(**config)), build(PhantomConfig(**config, ttt_enabled=False))
    for model in (plain, ghost):
        init_weights(model, 0)
    x = torch.randn(500, 256, generator=torch.Generator().manual_seed(0))
    for name in MATRICES:
        if name == "ffn.value":
            continue
        with torch.no_grad():
            a, b = (model.get_submodule(f"blocks.0.{name}")(x) for model in (plain, ghost))
        rows = ghost.config.core_rows(name)
        assert (
            a.std().item() == pytest.approx(b[:, :rows].std().item(), rel=0.05) == pytest.approx(b[:, rows:].std().item(), rel=0.05)
            or not a.any()
            and not b.any()
        ), name


def test_step_size_begins_at_its_rate_per_token():
    model = build(PhantomConfig(**SIZES, ttt_chunk=32, ttt_lr=0.02))
    init_weights(model, 0)
    for block in model.blocks:
        assert torch.allclose(2 * torch.sigmoid(block.att.ttt.rate), torch.tensor(0.64))
        assert not block.att.ttt.w2.any() and block.att.ttt.w1.any()


def test_the_memory_begins_with_the_step_size_that_is_given_and_as_nothing():
    for lr, first in ((None, 0.5), (0.01, 0.01), (1.9, 1.9)):
        model, idx = build(PhantomConfig(**SIZES, ttt_kind="memory", ttt_lr=lr)), tokens(1, 20)
        init_weights(model, 0)
        assert torch.allclose(2 * torch.sigmoid(model.blocks[1].att.ttt.rate), torch.tensor(first))
        with torch.no_grad():
            before = model(idx)
            model.blocks[1].att.ttt.rate.fill_(-30)
            assert torch.equal(model(idx), before)


def test_the_meta_term_is_the_mean_error_of_a_segment():
    """Over sequences, blocks and passes, and over the two segments that come after a step, of which the last is not complete."""
    model = alive(PhantomConfig(**SIZES, ttt_chunk=16, ttt_meta=True, ttt_loss_weight=0.3, max_depth_iter=2)).train()
    with torch.no_grad():
        x, terms = model.for_training(tokens(3, 40))
        same, state = model.features(tokens(3, 40), return_state=True)
    errors = torch.stack([one.wkv.error for block in state for one in block])
    assert torch.equal(x, same) and errors.shape == (4, 3) and errors.min() > 0
    assert list(terms) == ["meta_loss"] and terms["meta_loss"][0] == 0.3
    assert terms["meta_loss"][1].item() == pytest.approx(errors.sum().item() / (4 * 3 * 2), rel=1e-5)
    assert model.eval().for_training(tokens(3, 40))[1] == {}


def test_groups():
    for kind in ("state", "memory"):
        groups = param_groups(build(PhantomConfig(**SIZES, ttt_kind=kind)), 0.1)
        found = {name: (group["weight_decay"], group["my_lr_scale"]) for group in groups for name in group["names"]}
        for name, (decay, lr) in found.items():
            fast = name.endswith("att.w0") or ".ttt." in name and not name.endswith("ttt.features")
            assert lr == (2.0 if fast else 1.0), name
            matrix = name.endswith(("core.weight", "ghost.weight", "emb.weight", "head.weight"))
            assert decay == (0.1 if matrix else 0.0), name


def test_dropout_only_in_training():
    model = alive(PhantomConfig(**SIZES, dropout=0.5, ttt_chunk=16))
    idx = tokens(1, 20)
    with torch.no_grad():
        assert torch.equal(model(idx), model(idx))
        model.train()
        assert not torch.equal(model(idx), model(idx))
        engine = Engine(model, None)
        assert torch.equal(engine.read(idx[0].tolist())[0], engine.read(idx[0].tolist())[0]), "nor does an engine drop anything"


def test_bf16_stays_near():
    model, idx = alive(PhantomConfig(**SIZES, ttt_chunk=16)), tokens(2, 75)
    with torch.no_grad():
        want, got = model(idx), model.bfloat16()(idx)
    assert got.dtype == torch.bfloat16
    assert ((got.float() - want).pow(2).mean() / want.pow(2).mean()).sqrt() < 0.1


@pytest.mark.parametrize(
    "bad,word",
    [
        (dict(core_ratio=0.0), "--core_ratio 0.0 must lie in (0, 1]"),
        (dict(core_ratio=1.5), "--core_ratio 1.5 must lie in (0, 1]"),
        (dict(ttt_core_ratio=-1), "--ttt_core_ratio -1 must lie"),
        (dict(core_ratios="ffn=1"), "--core_ratios names 'ffn'"),
        (dict(core_ratios="ffn.key=x"), "'x' is not a number"),
        (dict(core_ratios="ffn.key=2"), "--core_ratios ffn.key 2.0 must lie"),
        (dict(ttt_chunk=40), "--ttt_chunk 40 is not a multiple of 16"),
        (dict(ttt_chunk=-16), "--ttt_chunk -16 is not"),
        (dict(ttt_steps=0), "--ttt_steps 0 must be at least 1"),
        (dict(max_depth_iter=0), "--max_depth_iter 0 must be at least 1"),
        (dict(ttt_lr=0), "--ttt_lr 0 must be above 0"),
        (dict(ttt_lr=0.05), "use --ttt_lr below 0.03125"),
        (dict(ttt_kind="other"), "choose one of: state, memory"),
        (dict(ghost_activation="gelu"), "choose one of: identity, relu"),
        (dict(ttt_kind="memory", ttt_lr=2.0), "--ttt_lr 2.0, but steps of 2 and more diverge; use --ttt_lr below 2"),
        (dict(ttt_kind="memory", ttt_features=48), "--ttt_features 48 does not go with --head_size 32; use one of: 32, 64, 128"),
        (dict(ttt_kind="memory", ttt_features=0), "--ttt_features 0 does not go with"),
        (dict(ttt_kind="memory", ttt_features=16), "--ttt_features 16 does not go with --head_size 32; use one of: 32, 64, 128"),
        (dict(dropout=1.0), "--dropout 1.0 must lie in [0, 1)"),
        (dict(layer_norm_eps=0.0), "--layer_norm_eps 0.0 must be above 0"),
    ],
    ids=str,
)
def test_bad_settings_are_named_with_the_cure(bad, word):
    with pytest.raises(UserError) as error:
        PhantomConfig(**SIZES | bad)
    assert word in str(error.value) and "\n" not in str(error.value)
