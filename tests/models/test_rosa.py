"""RWKV-8 with ROSA: against a float64 model written from the formulas, every mode against every other, its table, and its files."""

import math

import pytest
import torch

from oracles import x070
from oracles import x080 as oracle
from rwkvlm.checkpoint.pth import load_into, load_weights, save_weights
from rwkvlm.config import ModelConfig, RosaConfig, UserError, model_config
from rwkvlm.models import adapted, build, count_parameters, init_weights, kernel_of, param_groups, read_config
from rwkvlm.ops import rosa as rosa_op
from rwkvlm.ops import wkv7
from rwkvlm.ops.cross_entropy import head_cross_entropy

SIZES = dict(n_layer=2, n_embd=16, vocab_size=23, head_size=16)
VARIANTS = {
    "x080": dict(model_type="x080"),
    "x080, 1 bit": dict(model_type="x080", rosa_bits=1),
    "x080, DeepEmbed": dict(model_type="x080", deep_embed=True),
    "x080, no ln0": dict(model_type="x080", ln0=False),
    "rosa": dict(model_type="rosa"),
    "rosa, 1 bit, DeepEmbed": dict(model_type="rosa", rosa_bits=1, deep_embed=True),
}
every = pytest.mark.parametrize("variant", VARIANTS)


def alive(config, dtype=torch.float64, seed=0):
    """A model away from its initial values, where outputs are zero and many gradients vanish."""
    model = build(config).to(dtype)
    init_weights(model, seed)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64).to(dtype) / p.shape[-1] ** 0.5)
    return model


def tokens(batch, length, vocab=SIZES["vocab_size"], seed=2):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item()


@every
def test_forward_loss_and_every_gradient(variant):
    """Flips included: the oracle runs each sequence again for every bit."""
    config = model_config(**SIZES, **VARIANTS[variant], rosa_tau=0.2)
    model, data = alive(config), tokens(2, 10)
    idx, targets = data[:, :-1], data[:, 1:]
    params = {n: t.detach().clone().requires_grad_() for n, t in model.named_parameters()}
    want = oracle.logits(params, idx, config.head_size, config.rosa_bits, config.rosa_tau)
    want_loss, logit_grad = x070.loss_and_logit_gradient(want, targets)
    want_grads = dict(zip(params, torch.autograd.grad(want, list(params.values()), logit_grad)))

    assert relative(model(idx).detach(), want.detach()) < 1e-10
    loss = head_cross_entropy(model.features(idx), model.head.weight, targets)
    assert abs(loss.item() - want_loss.item()) < 1e-10
    loss.backward()
    for name, p in model.named_parameters():
        assert want_grads[name].abs().max() > 0, name
        assert relative(p.grad, want_grads[name]) < 1e-9, name


@every
@pytest.mark.parametrize("pieces", [[1] * 41, [16, 16, 9], [3, 1, 37], [40, 1]], ids=str)
def test_whole_sequence_pieces_and_single_tokens_agree(variant, pieces):
    model = alive(model_config(**SIZES, **VARIANTS[variant])).eval()
    idx = tokens(3, 41, vocab=5)  # few, so that there is much to recall
    with torch.no_grad():
        whole = model(idx)
        state, parts = model.init_state(3), []
        for piece in idx.split(pieces, 1):
            part, state = model(piece, state, return_state=True)
            parts.append(part)
        assert relative(torch.cat(parts, 1), whole) < 1e-9
        first, state = model(idx[:, :20], return_state=True)
        again = [model(idx[:, 20:], state) for _ in range(2)]
    assert torch.equal(*again), "a state is not changed by going on from it"
    assert relative(torch.cat([first, again[0]], 1), whole) < 1e-9


@every
def test_a_sequence_does_not_depend_on_its_neighbours_nor_on_what_follows(variant):
    model, idx = alive(model_config(**SIZES, **VARIANTS[variant])).eval(), tokens(3, 20)
    with torch.no_grad():
        whole = model(idx)
        assert relative(model(idx[1:2]), whole[1:2]) < 1e-9
        other = idx.clone()
        other[:, 12:] = (other[:, 12:] + 1) % SIZES["vocab_size"]
        changed = model(other)
    assert relative(changed[:, :12], whole[:, :12]) < 1e-9 and relative(changed[:, 12:], whole[:, 12:]) > 1e-3


@every
def test_every_parameter_is_trained_and_grad_cp_changes_nothing(variant):
    """Also with its initial values, where no gradient may be absent: DDP and ZeRO wait for each."""
    config, idx = model_config(**SIZES, **VARIANTS[variant]), tokens(2, 30)
    found = []
    for grad_cp in (False, True):
        model = alive(config)
        x, terms = model.for_training(idx, grad_cp)
        model.head(x).square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
        assert terms == {}
    for name, grad in found[0].items():
        assert grad.abs().max() > 0 and torch.equal(grad, found[1][name]), name
    fresh = build(config)
    init_weights(fresh, 0)
    fresh(idx).square().mean().backward()
    assert all(p.grad is not None for p in fresh.parameters())


def test_without_its_rosa_it_is_rwkv7():
    config = model_config("x080", **SIZES)
    model, plain = alive(config), build(ModelConfig(**SIZES)).double()
    with torch.no_grad():
        for block in model.blocks:
            block.rosa.o.weight.zero_()
            block.rosa.o.bias.zero_()
        load_into(
            plain,
            {
                name: tensor
                for name, tensor in model.state_dict().items()
                if ".rosa." not in name and ".ln3." not in name and name != "rosa_bits"
            },
        )
        idx = tokens(2, 30)
        assert relative(model(idx), plain(idx)) < 1e-12


def test_recall_reaches_as_far_back_as_the_text():
    """Two texts that differ in their first six tokens alone, 2000 tokens ago, are told apart by the pure ROSA model.

    Its state grows with each token.
    """
    model, answers = alive(model_config("rosa", **SIZES)).eval(), []
    filler, query = tokens(1, 2000, vocab=3, seed=6), tokens(1, 6, seed=5)
    with torch.no_grad():
        for seed in (7, 8):
            _, state = model(torch.cat([tokens(1, 6, seed=seed), filler], 1), return_state=True)
            answers.append(model(query, state))
        _, shorter = model(filler[:, :500], return_state=True)
    assert relative(*answers) > 1e-3
    assert sum(t.nbytes for t in leaves(state)) > 3 * sum(t.nbytes for t in leaves(shorter))


def leaves(state):
    if isinstance(state, torch.Tensor):
        return [state]
    return [leaf for part in state for leaf in leaves(part)] if isinstance(state, (list, tuple)) else []


@pytest.mark.parametrize("model_type", ["x080", "rosa"])
def test_initial_values(model_type):
    """Row by row: the official ones of the ROSA block, o divided by the number of blocks, k as q; everything else as RWKV-7 begins."""
    sizes = dict(n_layer=3, n_embd=128, vocab_size=300, head_size=64)
    model, plain = build(model_config(model_type, **sizes, deep_embed=True)), build(ModelConfig(**sizes))
    for m in (model, plain):
        init_weights(m, 7)
    weights, rwkv7, of_rosa = model.state_dict(), plain.state_dict(), set()
    for i in range(3):
        exact = {f"rosa.x_{c}": 0.0 for c in "qkv"} | {"rosa.rosa_qkv.emb": 1.0, "ln3.weight": 1.0, "ln3.bias": 0.0, "ffn.enn.weight": 1.0}
        for name, value in exact.items():
            assert (weights[f"blocks.{i}.{name}"] == value).all(), name
            of_rosa.add(f"blocks.{i}.{name}")
        for c in "qkvo":
            for part in ("weight", "bias"):  # torch.nn.Linear's own
                w, bound = weights[name := f"blocks.{i}.rosa.{c}.{part}"], 128**-0.5 * (1 / 3 if c == "o" else 1)
                assert 0.95 * bound < w.abs().max() <= bound and abs(w.std() * math.sqrt(3) / bound - 1) < 0.2
                of_rosa.add(name)
        assert all(torch.equal(weights[f"blocks.{i}.rosa.k.{part}"], weights[f"blocks.{i}.rosa.q.{part}"]) for part in ("weight", "bias"))
    names = {f"blocks.{i}.rosa.{c}.weight" for i in range(3) for c in "qvo"}
    assert len({weights[name][0, 0].item() for name in names}) == 9, "each of the others its own"
    assert weights["rosa_bits"].tolist() == [4.0]
    shared = {name for name in rwkv7 if model_type == "x080" or ".att." not in name and ".ln1." not in name}
    assert set(weights) == of_rosa | shared | {"rosa_bits"}
    assert all(torch.equal(weights[name], rwkv7[name]) for name in shared)


def test_groups():
    groups = param_groups(build(model_config("x080", **SIZES, deep_embed=True)), 0.1)
    found = {name: (group["weight_decay"], group["my_lr_scale"]) for group in groups for name in group["names"]}
    for name, (decay, lr) in found.items():
        large = (
            name in ("emb.weight", "head.weight")
            or name.endswith(".weight")
            and name.split(".")[-2] in ("receptance", "key", "value", "output", *"qkvo")
        )
        assert decay == (0.1 if large else 0.0), name
        bits = ".rosa." in name and name.split(".")[-2] in "qkv"
        assert lr == (2.0 if name.endswith("att.w0") else 0.1 if bits else 1.0), name


@every
def test_a_file_says_all_that_the_model_is(tmp_path, variant):
    config = model_config(**SIZES | dict(dim_ffn=40), **VARIANTS[variant], rosa_grad="soft", rosa_tau=0.5)
    model = alive(config, torch.float32)
    save_weights(tmp_path / "m.pth", model.state_dict())
    tensors = load_weights(tmp_path / "m.pth")
    assert read_config(tensors) == config.with_(rosa_grad="flip", rosa_tau=0.1), "how it was trained is not in the file"
    again = build(read_config(tensors))
    load_into(again, tensors)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
        assert torch.equal(again(tokens(1, 20)), model(tokens(1, 20)))


def official(config):
    """The state dict of the official classes, which have a ln0 in each block and nothing that says how many bits there are."""
    tensors = alive(config, torch.float32).state_dict()
    del tensors["rosa_bits"]
    for i in range(1, config.n_layer):
        for part in ("weight", "bias"):
            tensors[f"blocks.{i}.ln0.{part}"] = torch.ones(config.n_embd)
    return tensors


@pytest.mark.parametrize("variant", ["x080, 1 bit", "rosa"])
def test_official_files_are_read_when_it_is_said_how_many_bits_they_have(variant):
    config = model_config(**SIZES, **VARIANTS[variant])
    tensors = official(config)
    with pytest.raises(UserError, match="have 1 bit or 4 its shapes do not say; give --rosa_bits") as error:
        read_config(tensors)
    assert "\n" not in str(error.value)
    assert read_config(tensors, config.rosa_bits) == config
    model = build(config)
    init_weights(model, 1)
    load_into(model, adapted(tensors, model))
    assert model.rosa_bits.item() == config.rosa_bits
    assert read_config(model.state_dict(), 5 - config.rosa_bits) == config, "a file that says it is believed"
    assert torch.equal(model.blocks[1].rosa.q.weight, tensors["blocks.1.rosa.q.weight"])


@pytest.mark.parametrize(
    "damage, said",
    [
        (dict(rosa_bits=torch.tensor([3.0])), "rosa_bits cannot be read"),
        (dict(rosa_bits=torch.ones(2)), "rosa_bits cannot be read"),
        ({"blocks.0.ffn.key.weight": None}, "not a ROSA model: blocks.0.ffn.key.weight is missing; give a .pth file of type rosa"),
        ({"emb.weight": torch.ones(3)}, "emb.weight has shape"),
    ],
    ids=str,
)
def test_damaged_files(damage, said):
    tensors = build(model_config("rosa", **SIZES)).state_dict() | {"rosa_bits": torch.tensor([4.0])} | damage
    with pytest.raises(UserError, match=said) as error:
        read_config({name: tensor for name, tensor in tensors.items() if tensor is not None})
    assert "\n" not in str(error.value)


def test_counts_by_hand():
    C, V, L, F = 32, 50, 2, 128
    rosa = 3 * C + 4 * (C * C + C) + C
    rest = V * C + 2 * C + 2 * C + C * V + L * (2 * 2 * C + C + 2 * C * F)  # emb, ln0, ln_out, head, and in each block ln2, ln3, ffn
    config = model_config("rosa", n_layer=L, n_embd=C, vocab_size=V)
    assert count_parameters(build(config)) == L * rosa + rest
    assert count_parameters(build(config.with_(deep_embed=True))) == L * rosa + rest + L * V * C
    assert count_parameters(build(model_config("x080", n_layer=L, n_embd=C, vocab_size=V, head_size=16))) == count_parameters(
        build(ModelConfig(n_layer=L, n_embd=C, vocab_size=V, head_size=16))
    ) + L * (rosa + 2 * C)


def test_the_kernels_of_all_its_operators_are_made_ready_at_the_start(monkeypatch):
    """And not in the middle of a run, where one that is missing would end it."""
    asked = []
    for module in (rosa_op, wkv7):
        monkeypatch.setattr(module, "backend_for", lambda *_, name=module.__name__: asked.append(name) or name)
    for model_type, operators in dict(x080=["rwkvlm.ops.wkv7", "rwkvlm.ops.rosa"], rosa=["rwkvlm.ops.rosa"]).items():
        assert kernel_of(model_config(model_type, **SIZES), torch.device("cpu"), torch.float32) == operators[0]
        assert asked == operators
        asked.clear()


def test_sizes_without_meaning_do_not_make_models_different():
    assert model_config("rosa", **SIZES, rank_w=8) == model_config("rosa", **SIZES | dict(head_size=64)) and RosaConfig(
        **SIZES, rank_w=8
    ) != RosaConfig(**SIZES)


@pytest.mark.parametrize(
    "bad, said",
    [
        (dict(rosa_bits=2), "--rosa_bits 2 is not supported; choose one of: 1, 4"),
        (dict(rosa_grad="hard"), "--rosa_grad 'hard' is not known; choose one of: flip, soft"),
        (dict(rosa_tau=0.0), "--rosa_tau 0.0 must be above 0"),
        (dict(model_type="rosa", n_embd=40), "--n_embd 40 is not a multiple of 16"),
        (dict(n_embd=40), "--n_embd 40 is not a multiple of --head_size 16"),
        (dict(n_layer=0), "--n_layer is 0"),
    ],
)
def test_bad_settings_are_named(bad, said):
    with pytest.raises(UserError) as error:
        model_config(**dict(model_type="x080") | SIZES | bad)
    assert said in str(error.value) and "\n" not in str(error.value)
