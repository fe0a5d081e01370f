"""RWKV-4 files in both directions: the PyPI package `rwkv` gets our logits from our file, and we its from one in the official layout."""

import importlib.util

import pytest
import torch

from rwkvlm.checkpoint.pth import load_weights, save_weights
from rwkvlm.config import ModelConfig
from rwkvlm.infer.engine import load_engine
from rwkvlm.models import build, init_weights

C, LAYERS, VOCAB = 128, 3, 400


@pytest.fixture(scope="module")
def official():
    """The package's model class for RWKV-4, from a copy of its module: what the class is, it decides once, at import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RWKV_V7_ON", raising=False)
        for name in ("RWKV_JIT_ON", "RWKV_CUDA_ON"):
            patch.setenv(name, "0")
        precision = torch.get_float32_matmul_precision()
        spec = importlib.util.find_spec("rwkv.model")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        torch.set_float32_matmul_precision(precision)  # the package allows TF32 for the whole process
        yield lambda path: module.RWKV(str(path.with_suffix("")), "cpu fp32", verbose=False)


def ours(path):
    """A file that we save, whose weights are away from their initial values (where the output would be trivial)."""
    model = build(ModelConfig(model_type="x040", n_layer=LAYERS, n_embd=C, vocab_size=VOCAB))
    init_weights(model, 11)
    g = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=g) / p.shape[-1] ** (0.5 * (p.dim() == 2)))
    save_weights(path, model.state_dict())
    assert all(t.dtype == torch.bfloat16 for t in load_weights(path).values())


def theirs(path):
    """A file with the names, the shapes and the order of the released ones, made without our model, in fp16 as many of these are."""
    g = torch.Generator().manual_seed(13)
    normal = lambda *shape: torch.randn(*shape, generator=g)
    tensors = {"emb.weight": 0.1 * normal(VOCAB, C)}
    for i in range(LAYERS):
        at = f"blocks.{i}."
        for norm in ("ln1", "ln2", *["ln0"] * (i == 0)):
            tensors |= {f"{at}{norm}.weight": 1 + 0.1 * normal(C), f"{at}{norm}.bias": 0.1 * normal(C)}
        tensors |= {f"{at}att.time_decay": 3 * normal(C) - 2, f"{at}att.time_first": normal(C)}
        tensors |= {f"{at}att.time_mix_{x}": torch.rand(1, 1, C, generator=g) for x in "kvr"}
        tensors |= {f"{at}att.{name}.weight": normal(C, C) / C**0.5 for name in ("key", "value", "receptance", "output")}
        tensors |= {f"{at}ffn.time_mix_{x}": torch.rand(1, 1, C, generator=g) for x in "kr"}
        tensors |= {
            f"{at}ffn.key.weight": normal(4 * C, C) / C**0.5,
            f"{at}ffn.receptance.weight": normal(C, C) / C**0.5,
            f"{at}ffn.value.weight": normal(C, 4 * C) / C,
        }
    tensors |= {"ln_out.weight": 1 + 0.1 * normal(C), "ln_out.bias": 0.1 * normal(C), "head.weight": normal(VOCAB, C) / C**0.5}
    torch.save({name: tensor.half() for name, tensor in tensors.items()}, path)


def exact_copy(path):
    """The same numbers in fp32.

    The package keeps what ln0 makes of the embedding in the dtype of the file, which costs it digits that we do not lose.
    """
    copy = path.with_name("copy.pth")
    torch.save({name: tensor.float() for name, tensor in load_weights(path).items()}, copy)
    return copy


@pytest.mark.parametrize("write", [ours, theirs])
def test_logits_at_every_position_whole_and_token_by_token(official, write, tmp_path):
    torch.set_num_threads(1)  # thousands of tiny operations: threads would only wait for one another
    path = tmp_path / "rwkv-0.pth"
    write(path)
    engine, package = load_engine(path, device="cpu", dtype=torch.float32), official(exact_copy(path))
    tokens = torch.randint(VOCAB, (48,), generator=torch.Generator().manual_seed(14)).tolist()
    with torch.no_grad():
        mine = engine.model(torch.tensor([tokens]))[0]
        whole, _ = package.forward(tokens, None, full_output=True)
        states, steps = [None, None], [[], []]
        for token in tokens:
            one, states[0] = package.forward([token], states[0])
            two, states[1] = engine.read([token], states[1])
            steps[0].append(one)
            steps[1].append(two[0])
        rounded, _ = official(path).forward(tokens, None, full_output=True)
    assert mine.std() > 0.1, "a trivial output would prove nothing"
    for other in (whole, *map(torch.stack, steps)):
        assert (mine - other).abs().max() < 2e-4
    assert (mine - rounded).abs().max() < 2e-2 * mine.std()  # the very file
