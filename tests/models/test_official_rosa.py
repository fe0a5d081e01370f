"""RWKV-LM's own RWKV-8 models, which turn numbers round and add them, in our x080: the official logits, nearly all digits right.

They are not part of this repository: RWKV_OFFICIAL_SRC names RWKV-v7/train_temp/src of a clone of RWKV-LM; without it these
tests are skipped. The program is run on the CPU up to where it has loaded its model, with our wkv7 in the place of its CUDA
kernel.
"""

import os
import random
from pathlib import Path

import pytest
import torch

from rwkvlm.checkpoint.pth import load_into, load_weights
from rwkvlm.cli import main
from rwkvlm.infer import load_engine
from rwkvlm.models import adapted, build, read_config
from rwkvlm.ops.wkv7 import wkv7

SRC = os.environ.get("RWKV_OFFICIAL_SRC", "")
pytestmark = pytest.mark.skipif(not SRC, reason="RWKV_OFFICIAL_SRC does not name the folder of the official sources")
FOLDER = Path(SRC).parents[2] / "RWKV-v8" if SRC else Path()
SYMBOLS = "0123456789,#"


def official(name: str) -> torch.nn.Module:
    weights = load_weights(FOLDER / f"{name}.pth")
    model = build(read_config(weights, 1))
    load_into(model, adapted(weights, model))
    return model


def convert(name: str, folder: Path) -> int:
    """The exit code of train.py asked to write the file as an x080 into the folder."""
    flags = "--train_stage 1 --my_testing x080 --rosa_bits 1".split()
    return main(["train", *flags, "--load_model", str(FOLDER / f"{name}.pth"), "--proj_dir", str(folder)])


def program(name: str) -> torch.nn.Module:
    """The model of RWKV-v8/251105_reverse_run.py."""
    text = (FOLDER / "251105_reverse_run.py").read_text()
    text = text[: text.index("print('#'*100)")]
    text = text[: text.index("from torch.utils.cpp_extension")] + "HEAD_SIZE = 16\n" + text[text.index("class RWKV_Tmix_x070") :]
    for there, here in (
        ("device='cuda'", "device='cpu'"),
        ("torch.cuda.manual_seed_all", "int"),
        ("torch.jit.ScriptModule", "nn.Module"),
        ("torch.jit.script_method", "lambda f: f"),
        ("LOAD_NAME = '260123_reverse_L2'", f"LOAD_NAME = '{name}'"),
        ("f'{LOAD_NAME}.pth'", repr(str(FOLDER / f"{name}.pth"))),
    ):
        assert there in text, there
        text = text.replace(there, here)
    found = {"RUN_CUDA_RWKV7g": official_wkv7}
    exec(compile(text, name, "exec"), found)
    return found["model"].float()


def official_wkv7(q, w, k, v, a, b):
    """[B, T, C]; w is the log of the log decay here, and raw in ours: exp(-exp(w)) = exp(-exp(-1/2) sigmoid(raw))."""
    raw = -torch.log(torch.expm1(-(w.double() + 0.5)))
    return wkv7(*(x.float().unflatten(2, (-1, 16)).contiguous() for x in (q, raw, k, v, a, b))).flatten(2)


@pytest.mark.parametrize("name, digits", [("251105_reverse_L2", 60), ("260123_reverse_L2", 120), ("260123_reverse_L2_only_rwkv7", 60)])
def test_numbers_are_turned_round(name, digits):
    """12,21#: two numbers of each number of digits; asked is what comes behind the comma. Published: 99.8, 99.6 and 100 % right."""
    draw, model = random.Random(1), official(name)
    numbers = [str(draw.randint(10 ** (n - 1), 10**n - 1)) for n in range(1, digits + 1) for _ in range(2)]
    texts = torch.tensor([[SYMBOLS.index(c) for c in f"{number},{number[::-1]}".ljust(2 * digits + 2, "#")] for number in numbers])
    with torch.no_grad():
        logits = model(texts[:, :-1])
        expected = program(name)(some := texts[3 :: digits // 2, :-1])
    assert torch.allclose(model(some), expected, atol=1e-3 * expected.abs().max())
    asked = (texts[:, :-1] == SYMBOLS.index(",")).cumsum(1).bool() & (texts[:, 1:] != SYMBOLS.index("#"))
    right = (logits.argmax(-1) == texts[:, 1:])[asked].float().mean().item()
    print(f"{name}: {right:.4f} of {asked.sum()} digits")
    assert right > 0.985


def test_sums_and_differences():
    """12+9=21=, 31554 digits officially, 96.9 % right."""
    draw, model, symbols, right = random.Random(1), official("251024_rosaQKV_L2_digit20"), "0123456789+-=", []
    for most in range(1, 21):
        for less in range(1, 2 * most):
            a, b = (draw.randint(10 ** (n - 1) - (n == 1), 10**n - 1) for n in (min(less, most), min(2 * most - less, most)))
            sign = draw.choice("+-")
            asks, answer = f"{a}{sign}{b}=", f"{a + b if sign == '+' else a - b}"
            text = torch.tensor([[symbols.index(c) for c in asks + answer]])
            with torch.no_grad():
                right += (model(text[:, :-1]).argmax(-1) == text[:, 1:])[0, len(asks) - 1 :].tolist()
    print(f"{sum(right) / len(right):.4f} of {len(right)} digits")
    assert sum(right) / len(right) > 0.955


@pytest.mark.parametrize("name", ["251016_rosa_1bit_run", "251018_rosa_4bit_run"])
def test_stacks_of_layers_that_read_their_own_input_are_refused(name, tmp_path, capsys):
    assert convert(name, tmp_path) == 2
    err = capsys.readouterr().err
    assert "which no --my_testing is" in err and err.count("\n") == 1


def test_a_converted_file_turns_numbers_round(tmp_path):
    """In bfloat16, as all files of a run are, token by token."""
    assert convert("251105_reverse_L2", tmp_path) == 0
    engine = load_engine(tmp_path / "rwkv-init.pth", device="cpu")
    with torch.inference_mode():
        logits, state = engine.read([SYMBOLS.index(c) for c in "31415926535,"])
        said = ""
        for _ in range(12):
            said += SYMBOLS[token := int(logits.argmax())]
            logits, state = engine.read([token], state)
    assert said == "53562951413#"
