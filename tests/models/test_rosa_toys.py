"""RWKV-LM's small models with ROSA, whose files have names of their own, a bias in the head and no ln0: made here of models of ours."""

import pytest
import torch

from rwkvlm.checkpoint.pth import load_into, load_weights
from rwkvlm.config import UserError, model_config
from rwkvlm.models import adapted, build, init_weights, read_config

PARTS = {"att": "rwkv{}", "ffn": "ffn{}", "rosa": "rosa{}", "ln1": "ln{}a", "ln2": "ln{}b", "ln3": "ln{}c"}
CONFIG = model_config(
    "x080", n_layer=2, n_embd=16, vocab_size=12, head_size=16, rank_w=8, rank_a=8, rank_v=8, rank_g=8, rosa_bits=1, ln0=False
)


def toy_name(name):
    words = name.split(".")
    if words[0] == "blocks":
        return ".".join([PARTS[words[2]].format(int(words[1]) + 1), *words[3:]])
    return ".".join([{"emb": "e", "ln_out": "lno", "head": "o"}[words[0]], *words[1:]])


def toy(config=CONFIG):
    """A model, and its weights as a toy's file has them, but for the head's bias."""
    model = build(config)
    init_weights(model, 0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model, {toy_name(name): tensor for name, tensor in model.state_dict().items() if name != "rosa_bits"}


def read(path, tensors):
    """As every command does it that is told the bits."""
    torch.save(tensors, path)
    found = load_weights(path)
    model = build(read_config(found, 1))
    load_into(model, adapted(found, model))
    return model


def test_it_is_the_model_with_the_bias_in_its_logits(tmp_path):
    model, tensors = toy()
    bias, idx = torch.randn(12), torch.randint(12, (3, 40))
    assert {"e.weight", "ln1a.weight", "ln2c.bias", "rwkv1.w1", "rosa2.rosa_qkv.emb", "ffn2.key.weight", "lno.bias", "o.weight"} <= set(
        tensors
    )
    plain, biased = read(tmp_path / "a.pth", tensors), read(tmp_path / "b.pth", tensors | {"o.bias": bias})
    assert plain.config == biased.config == CONFIG and not [name for name in biased.state_dict() if "ln0" in name or name == "head.bias"]
    with torch.no_grad():
        assert torch.equal(plain(idx), model(idx))
        assert (biased(idx) - (model(idx) + bias)).abs().max() < 1e-5


def test_dependent_rows_with_a_bias_that_fits_them(tmp_path):
    """Of two equal rows, with equal biases."""
    _, tensors = toy()
    tensors["o.weight"][1], bias = tensors["o.weight"][0], torch.randn(12)
    bias[1] = bias[0]
    read(tmp_path / "a.pth", tensors | {"o.bias": bias})


def test_its_bits_must_be_said(tmp_path):
    torch.save(toy()[1], tmp_path / "a.pth")
    with pytest.raises(UserError, match="1 bit or 4 its shapes do not say; give --rosa_bits"):
        read_config(load_weights(tmp_path / "a.pth"))


@pytest.mark.parametrize(
    "change, said",
    [
        (
            {"e.weight": torch.ones(20, 16), "o.weight": torch.randn(20, 16), "o.bias": torch.randn(20)},
            r"o.bias \[20\] cannot become part of lno.bias: the 20 rows",
        ),
        ({"o.weight": torch.ones(12, 16), "o.bias": torch.arange(12.0)}, "the 12 rows of o.weight do not reach it"),
        ({"o.weight": torch.full((12, 16), torch.nan), "o.bias": torch.ones(12)}, "do not reach it"),
        ({"o.bias": torch.ones(11)}, r"o.bias \[11\]"),
        ({"o.bias": torch.ones(12), "lno.bias": torch.ones(15)}, r"o.bias \[12\]"),
        ({"o.bias": torch.ones(12), "lno.bias": None}, "ln_out.bias is missing; give a .pth file of type x080"),
        ({"o.bias": torch.ones(12), "o.weight": torch.ones(12)}, r"head.weight has shape \[12\], not 2 dimensions"),
        ({"ln1a.weight": None}, "lacks blocks.0.ln1.weight"),
        ({"ln3a.weight": torch.ones(16)}, "the checkpoint lacks blocks.2"),
        ({"lin.weight": torch.ones(16, 16)}, "lin.weight is unknown to this model"),
        (
            {"emb_rosa.emb.weight": torch.ones(12, 16), "rosa1.emb0": torch.ones(1, 1, 16)},
            "a stack of ROSA layers that read their own input .*, which no --my_testing is",
        ),
    ],
    ids=lambda x: "".join(x) if isinstance(x, dict) else "",
)
def test_what_cannot_be_is_said_in_a_line(tmp_path, change, said):
    with pytest.raises(UserError, match=said) as error:
        read(tmp_path / "a.pth", {name: tensor for name, tensor in (toy()[1] | change).items() if tensor is not None})
    assert "\n" not in str(error.value)
