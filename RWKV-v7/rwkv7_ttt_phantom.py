"""RWKV-7 TTT Phantom as a library: the model's public face over the package rwkvlm.

In short:

    from rwkv7_ttt_phantom import create_model
    model = create_model()
    logits, state = model(idx)
    tokens = model.generate([1, 2, 3], max_new_tokens=20)
"""

from __future__ import annotations

import functools
import os
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from rwkvlm.checkpoint.pth import load_into, load_weights
from rwkvlm.config import PhantomConfig, TrainConfig, UserError
from rwkvlm.config.phantom import core_ratio_of
from rwkvlm.infer.engine import PREFILL
from rwkvlm.infer.sampling import check_sampling, sample
from rwkvlm.models import adapted, init_weights, read_config
from rwkvlm.models.lm import State
from rwkvlm.models.phantom import Phantom
from rwkvlm.ops import backend

__all__ = [
    "RWKV7Phantom",
    "RWKV7PhantomConfig",
    "UserError",
    "create_model",
    "load_pretrained_rwkv7",
    "load_state",
    "save_state",
    "train_model",
]


@dataclass(frozen=True)
class RWKV7PhantomConfig:
    """The settings of a model. What they mean: rwkvlm.config.PhantomConfig.

    n_head and head_size: n_embd is their product. core_ratio and ghost_ratio sum to 1; either may be left out
    (core_ratio: 0.2). use_svd_compression and use_sparsity: train_model compresses what it has trained by
    svd_rank_ratio and sparsity_ratio (rwkvlm.compress); they change neither its training nor its size before.
    use_cuda_kernel False: this model is computed by plain PyTorch, not by native kernels.
    """

    n_layer: int = 12
    n_embd: int = 768
    n_head: int = 12
    head_size: int = 64
    vocab_size: int = 65536
    core_ratio: float | None = None
    ghost_ratio: float | None = None
    core_ratios: str = ""
    ghost_activation: str = "identity"
    ttt_enabled: bool = True
    ttt_kind: str = "state"
    ttt_chunk: int = 64
    ttt_lr: float | None = None
    ttt_steps: int = 1
    ttt_core_ratio: float = 0.25
    ttt_head: bool = True
    ttt_target: str = "stored"
    ttt_anchor: float = 0.01
    ttt_second_order: bool = True
    ttt_meta: bool = False
    ttt_loss_weight: float = 0.1
    ttt_features: int | None = None
    max_depth_iter: int = 1
    use_svd_compression: bool = False
    svd_rank_ratio: float = 0.5
    use_sparsity: bool = False
    sparsity_ratio: float = 0.3
    dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    use_cuda_kernel: bool = True

    def __post_init__(self) -> None:
        if self.n_head * self.head_size != self.n_embd:
            raise UserError(f"n_head {self.n_head} times head_size {self.head_size} is not n_embd {self.n_embd}; change one of them")
        if not 0 < self.svd_rank_ratio <= 1:
            raise UserError(f"svd_rank_ratio {self.svd_rank_ratio} must lie in (0, 1]")
        if not 0 <= self.sparsity_ratio < 1:
            raise UserError(f"sparsity_ratio {self.sparsity_ratio} must lie in [0, 1)")
        ratio = core_ratio_of(self.core_ratio, self.ghost_ratio)
        object.__setattr__(self, "core_ratio", PhantomConfig.core_ratio if ratio is None else ratio)
        object.__setattr__(self, "ghost_ratio", 1 - self.core_ratio)
        object.__setattr__(self, "ttt_lr", self.sizes().ttt_lr)

    def sizes(self, **changes: Any) -> PhantomConfig:
        """The same for the package. Raises UserError for what does not fit together."""
        known = {f.name for f in fields(PhantomConfig)}
        return PhantomConfig(**{f.name: getattr(self, f.name) for f in fields(self) if f.name in known} | changes)


class RWKV7Phantom(Phantom):
    """The model, with its state as part of each call."""

    def forward(
        self, idx: torch.Tensor, state: State | None = None, return_state: bool = True
    ) -> torch.Tensor | tuple[torch.Tensor, State]:
        """idx: [B, T] int64. Returns logits [B, T, V] and the state after them; the logits alone with return_state False."""
        return super().forward(idx, state, return_state)

    @torch.no_grad()  # not inference_mode, whose tokens no later training could read
    def generate(
        self,
        prompt: list[int] | torch.Tensor,
        max_new_tokens: int = 20,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        state: State | None = None,
    ) -> list[int] | torch.Tensor:
        """Continues a prompt, all of which is read, and returns the new tokens alone.

        prompt: a list of tokens, or int64 [T] or [B, T]; the new tokens have the same form. UserError for an empty one and for tokens
        outside the model's vocabulary.
        """
        check_sampling(temperature, top_p, top_k)
        device = self.emb.weight.device
        idx = torch.as_tensor(prompt, dtype=torch.int64, device=device)
        rows = idx if idx.dim() == 2 else idx[None]
        if rows.shape[1] == 0:
            raise UserError("the prompt is empty; give at least one token")
        if len(unknown := rows[(rows < 0) | (rows >= self.config.vocab_size)]):  # on a GPU such an index ends the process
            raise UserError(
                f"the prompt has token {unknown[0]}, but the model's vocabulary has {self.config.vocab_size}; "
                "use the tokenizer it was trained with"
            )
        generator = torch.Generator(device)
        generator.seed() if seed is None else generator.manual_seed(seed)
        was_training, found = self.training, []
        self.eval()
        try:
            for piece in rows.split(PREFILL, dim=1):
                x, state = self.features(piece, state, return_state=True)
            for left in range(max_new_tokens - 1, -1, -1):
                found.append(sample(self.head(x[:, -1]), temperature, top_p, top_k, generator))
                if left:
                    x, state = self.features(found[-1][:, None], state, return_state=True)
        finally:
            self.train(was_training)
        new = torch.stack(found, 1) if found else rows[:, :0]
        new = new if idx.dim() == 2 else new[0]
        return new if isinstance(prompt, torch.Tensor) else new.tolist()


def create_model(config: RWKV7PhantomConfig | None = None, seed: int = 0) -> RWKV7Phantom:
    """A model with its initial values."""
    config = config or RWKV7PhantomConfig()
    return _made(config.sizes(), config, seed)


def _made(sizes: PhantomConfig, config: RWKV7PhantomConfig, seed: int) -> RWKV7Phantom:
    model = RWKV7Phantom(sizes)
    init_weights(model, seed)
    if not config.use_cuda_kernel:
        for block in model.blocks:  # and not around all of them: checkpointing calls each again in the backward pass
            block.forward = functools.partial(_in_plain_pytorch, block.forward)
    return model


def _in_plain_pytorch(forward: Callable, *args: Any, **kwargs: Any) -> Any:
    with backend.asked_for("torch"):
        return forward(*args, **kwargs)


def load_pretrained_rwkv7(checkpoint_path: str | Path, config: RWKV7PhantomConfig | None = None, seed: int = 0) -> RWKV7Phantom:
    """A Phantom from a .pth file of an RWKV-7 or of a Phantom.

    Of an RWKV-7 the file gives the sizes and config the switches; a Phantom's file says all. The matrices of an RWKV-7
    become Ghost layers of least error (layers/ghost.py); test-time training begins with its initial values. With
    core_ratio 1 and ttt_enabled False the logits are RWKV-7's to the bit.
    """
    config, tensors = config or RWKV7PhantomConfig(), load_weights(checkpoint_path)
    sizes = read_config(tensors)
    if sizes.model_type not in ("x070", "phantom"):
        raise UserError(f"{checkpoint_path} holds a model of type {sizes.model_type}; give a .pth file of an RWKV-7 or a Phantom")
    if sizes.model_type != "phantom":
        sizes = config.sizes(**sizes.as_dict() | {"model_type": "phantom", "ghost_permuted": True})
        if sizes.has_ghosts and sizes.ghost_activation != "identity":
            raise UserError(
                f"ghost_activation {sizes.ghost_activation!r}: the matrices of an RWKV-7 can only be factorised with the identity"
            )
    model = _made(sizes, config, seed)
    load_into(model, adapted(tensors, model))
    return model


def train_model(data_path: str | Path, output_dir: str | Path, config: RWKV7PhantomConfig | None = None, **flags: Any) -> RWKV7Phantom:
    """Trains on DATA_PATH.bin and .idx into output_dir with the trainer of train.py, and returns the model.

    With use_svd_compression or use_sparsity that is the model of rwkv-compressed.pth, made from the last weights and beside them.
    flags: those of train.py (lr_init=..., strategy="deepspeed_stage_2", ...). Called again, it goes on where it stopped. Raises UserError
    for what does not fit, and RuntimeError when training has not come to its end: by a signal, by max_steps, or because memory ran out.
    """
    from rwkvlm.train.plan import make_plan  # Lightning takes seconds to import
    from rwkvlm.train.run import run

    config = config or RWKV7PhantomConfig()
    given = {f.name for f in fields(TrainConfig)}
    settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name in given - {"ghost_ratio"}}
    sizes = config.sizes()
    settings |= {"ttt_lr": sizes.ttt_lr, "ttt_features": sizes.ttt_features, "ttt_head": sizes.has_ttt_head}
    settings |= {} if config.use_cuda_kernel else {"kernel": "torch"}
    settings = {name: int(value) if isinstance(value, bool) else value for name, value in settings.items()}
    asked = TrainConfig(
        **{"my_testing": "phantom", "train_stage": 3, "data_file": str(data_path), "proj_dir": str(output_dir)} | settings | flags
    )
    final = Path(output_dir) / "rwkv-final.pth"
    with backend.restored():
        code = run(asked)
        ended = code == 0 and final.exists()
        # of a finished run that is trained longer, the file of before is there until the new end
        if ended and (asked.max_steps or asked.dry_run):
            ended = make_plan(replace(asked, train_stage=3, load_model="", epoch_begin=0)).finished
    if code == 1:
        raise RuntimeError("training ended because memory ran out: less micro_bsz, or grad_cp=1; the same call goes on from the last state")
    if code:
        raise RuntimeError(
            f"training was stopped by {signal.Signals(code - 128).name}; its state is saved in {output_dir}, the same call goes on from it"
        )
    if not ended:  # the newest rwkv-{n}.pth may be the one that training began with
        raise RuntimeError(
            "training ended before its last token, as max_steps (or dry_run, or train_stage 1) asks; "
            f"the call without it goes on from what is saved in {output_dir}"
        )
    return load_pretrained_rwkv7(_compressed(final, config) if config.use_svd_compression or config.use_sparsity else final, config)


def _compressed(trained: Path, config: RWKV7PhantomConfig) -> Path:
    from rwkvlm.compress import compress_file

    svd, sparsity = config.svd_rank_ratio if config.use_svd_compression else 1.0, config.sparsity_ratio if config.use_sparsity else 0.0
    out = trained.with_name("rwkv-compressed.pth")
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:  # every process of a run comes here and makes the same file
        compress_file(trained, Path(folder) / out.name, svd, sparsity)
        os.replace(Path(folder) / out.name, out)
    return out


def save_state(path: str | Path, state: State) -> None:
    """Writes a state as a list of tensors; what was at `path` before is replaced when all is written."""
    partial = Path(path).with_name(f".{Path(path).name}.tmp")
    torch.save(pytree.tree_leaves(state), partial)
    os.replace(partial, path)


def load_state(path: str | Path, model: Phantom) -> State:
    """A state that save_state has written, on this model's device and in its dtypes.

    Raises UserError for any other file, and for the state of a model with other sizes.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind: torch's reader runs over whatever bytes a file holds as if they were a pickle's
        raise UserError(
            f"{path} {'is truncated or no state' if os.path.isfile(path) else 'is no file'}; give a file that save_state has written"
        ) from error
    if not isinstance(tensors, list) or not all(isinstance(t, torch.Tensor) for t in tensors):
        raise UserError(f"{path} is no state; give a file that save_state has written")
    like = model.init_state(tensors[0].shape[0] if tensors and tensors[0].dim() else 1)
    leaves = pytree.tree_leaves(like)
    if [t.shape for t in tensors] != [leaf.shape for leaf in leaves]:
        raise UserError(f"{path} is the state of another model; make it again with this one")
    return pytree.tree_unflatten([t.to(leaf) for t, leaf in zip(tensors, leaves)], pytree.tree_structure(like))
