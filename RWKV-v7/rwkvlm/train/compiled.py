"""--compile: the blocks through torch.compile, one compilation for all that are alike; and the settings with which that does not work."""

from __future__ import annotations

import importlib.util
import shutil
import sysconfig
from pathlib import Path

import torch
import torch._dynamo  # not part of torch until it is asked for

from ..config import ModelConfig, PhantomConfig, TrainConfig, UserError, env
from ..config.errors import pip_install
from ..models import LanguageModel, recurrence
from .strategy import Launch

# compilations at most: of the first block and of the others, in training and validation, and of blocks that --freeze makes different
GRAPHS = 64


def compile_blocks(model: LanguageModel, lengths_vary: bool = False, graphs: bool = False) -> None:
    """Compiles the blocks in place, names stay as they are; the compiler runs when a block is called first.

    lengths_vary: from batch to batch, as packed documents do. graphs: what is compiled runs in CUDA graphs.

    Whole blocks only: what cannot be traced, and more than GRAPHS kinds of them, is an error and not a silent way back
    to Python. Shapes are either known or symbols from the first batch on, so that a resumed run has the same kernels as
    one that was not interrupted.
    """
    torch._dynamo.config.recompile_limit = GRAPHS
    torch._dynamo.config.optimize_ddp = False  # would cut the blocks at DDP's buckets; gradients are handed over block by block as it is
    # deterministic: no kernel is chosen by timing it, where that would change the bits
    options = {"deterministic": True, "triton.cudagraphs": graphs}
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=lengths_vary, options=options)


def check_compile(config: TrainConfig, run: Launch, model: ModelConfig, kernel: str) -> None:
    """UserError where --compile 1 would not work, or not well. kernel: who computes the model's recurrence.

    On a CPU it tries the compiler, which takes some seconds.
    """
    if not config.compile:
        return
    if run.strategy.startswith("deepspeed_stage_3"):
        raise UserError(
            f"--compile 1 does not work with --strategy {run.strategy}, "
            "which has a block's parameters only while it runs module by module; "
            "use deepspeed_stage_2 or ddp, or leave --compile out"
        )
    if isinstance(model, PhantomConfig) and model.ttt_enabled:
        raise UserError(
            "--compile 1 is not made for test-time training, "
            "whose segments are in most forms a loop in Python that would take minutes to compile; "
            "use --ttt_enabled 0, or leave --compile out"
        )
    if config.doc_reset and model.model_type in ("hybrid", "x080", "rosa", "x040"):
        raise UserError(
            f"--compile 1 does not go with --doc_reset 1 for --my_testing {model.model_type}, "
            "which runs document by document in Python; leave one of them out"
        )
    if problem := _why_not(run.device):
        raise UserError(f"--compile 1: torch.compile does not work here: {problem}; or leave --compile out")
    if kernel == "torch":
        raise UserError(
            "--compile 1 needs the native kernels: "
            f"in plain PyTorch {recurrence(model)} is a loop in Python that would take minutes to compile; "
            "python -m rwkvlm doctor says what they need, or leave --compile out"
        )


def _why_not(device: torch.device) -> str:
    """Empty when torch.compile works for the device, else the reason, with the cure.

    On a GPU it is not tried: each process asks before it has chosen its own, and would take half a gigabyte of the one
    that happens to be current.
    """
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return f"triton is not installed; run: {pip_install('triton')}, in the version that torch asks for"
        if not any(map(shutil.which, (env.cc(), "gcc", "clang"))) or not Path(sysconfig.get_path("include"), "Python.h").exists():
            return "triton needs a C compiler and Python's headers (apt-get install gcc python3-dev)"
        return ""
    if shutil.which(env.cxx()) is None:
        return f"no C++ compiler ({env.cxx()} is not on the PATH); install g++ or set CXX"
    try:
        torch.compile(lambda x: x.sin() + 1, fullgraph=True)(torch.ones(64))
    except Exception as error:  # whatever a compiler or a missing header raises
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        line = next((line for line in lines if "error:" in line), lines[0])
        return f"{line[:200]}; it needs g++ and Python's headers (apt-get install g++ python3-dev)"
    return ""
