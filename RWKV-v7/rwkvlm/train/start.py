"""Where a run begins: from its saved training state, from a .pth file, or from fresh weights; and the sizes of the model that follow."""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import models
from ..checkpoint.ledger import is_own
from ..checkpoint.pth import INIT, load_into, load_weights, newest_weights
from ..checkpoint.ranks import say
from ..checkpoint.state import StateInfo, find_state
from ..config import HybridConfig, ModelConfig, PhantomConfig, RosaConfig, TrainConfig, UserError, model_config, phantom, rosa
from .position import Position

SIZES = ("n_layer", "n_embd", "vocab_size", "head_size", "dim_ffn", "rank_w", "rank_a", "rank_v", "rank_g")
INIT_NAME, FINAL_NAME = "rwkv-init.pth", "rwkv-final.pth"
WARMUP_AFTER_WEIGHTS = 10  # steps, as officially, when a run goes on from weights without optimizer state


@dataclass(frozen=True)
class Start:
    """state: a training state to go on from, exactly; else path: weights. fresh: path does not exist yet and is to be made.

    position: of the first step. warmup_steps: decided. model: the sizes of what is loaded.
    """

    model: ModelConfig
    position: Position
    warmup_steps: int
    path: Path | None = None
    state: StateInfo | None = None
    fresh: bool = False

    def __str__(self) -> str:
        if self.state is not None:
            return f"training state {self.state.path}, step {self.position.step}"
        return f"fresh weights, to be saved as {self.path}" if self.fresh else str(self.path)


def what_goes_on(config: TrainConfig) -> str:
    """How a run that these flags have begun is continued, for messages: stages 0 and 1 refuse to overwrite it."""
    return "the same command" if config.train_stage >= 2 else "the same command with --train_stage 3"


def find_start(config: TrainConfig, order: int | str, identity: list[dict], damaged: Collection[Path] = ()) -> Start:
    """Where a run with these settings begins.

    With train_stage 2 and 3 from the newest intact training state, else as officially from the newest rwkv-{n}.pth, else
    from rwkv-init.pth; without any of these, and with train_stage 0, from load_model or fresh weights.

    order: what decides the order of the data (Mixture.order). identity: which data these are (Mixture.identity).
    damaged: training states that are not to be used.

    Raises UserError when the files do not fit the flags, and instead of overwriting a run that is not being continued.
    """
    if config.train_stage >= 2:
        start = _from_state(config, order, identity, damaged) or _from_newest_weights(config)
        if start is not None:
            for name in ("load_model", "epoch_begin"):
                if getattr(config, name):
                    say(
                        f"--{name} {getattr(config, name)} has no effect: "
                        f"--train_stage {config.train_stage} goes on with what {config.proj_dir} holds"
                    )
            return start
        if (final := Path(config.proj_dir) / FINAL_NAME).exists():
            raise UserError(
                f"there is nothing to go on from in {config.proj_dir} but {final.name}, which a new run would overwrite; "
                f"choose another --proj_dir, with --load_model {final} to train it further"
            )
    else:
        refuse_to_overwrite(config, from_mini_epoch=config.epoch_begin)
    position = Position(samples=config.epoch_begin * config.epoch_samples)
    if config.load_model:
        path = Path(config.load_model)
        warmup = _warmup(config, WARMUP_AFTER_WEIGHTS if config.epoch_begin else 0)
        return Start(model_sizes(config, path), position, warmup, path)
    tell_of_unused_weights(config.proj_dir)
    return Start(model_sizes(config), position, _warmup(config, 0), Path(config.proj_dir) / INIT_NAME, fresh=True)


def tell_of_unused_weights(proj_dir: str) -> None:
    """One line where a run begins with fresh weights beside a file of weights that has no name by which one is found."""
    for path in sorted(Path(proj_dir).glob("*.pth")):
        if path.is_file() and not re.fullmatch(r"rwkv-(init|\d+)\.pth", path.name):
            say(
                f"{path} is not used: the run begins with fresh weights; "
                f"to begin with those, call the file {INIT_NAME} and use --train_stage 3, or --load_model {path}"
            )
            return


def _warmup(config: TrainConfig, default: int) -> int:
    return default if config.warmup_steps < 0 else config.warmup_steps


def _from_state(config: TrainConfig, order: int | str, identity: list[dict], damaged: Collection[Path]) -> Start | None:
    info = find_state(config.proj_dir, damaged)
    if info is None:
        return None
    for name, now in (("ctx_len", config.ctx_len), ("magic_prime", order)):
        if (then := info.meta[name]) != now:
            if name == "ctx_len" or config.magic_prime:
                is_now, cure = f"--{name} is {now}", f"--{name} {then}"
            else:  # computed: the data are others
                is_now, cure = f"--data_file {config.data_file} means {'magic_prime ' * isinstance(now, int)}{now}", "the data of that run"
            raise UserError(
                f"{is_now}, but {info.path} was trained with {then}: the order of the data would break; "
                f"use {cure}, or another --proj_dir with --load_model to begin anew"
            )
    if (then := info.meta["epoch_samples"]) != config.epoch_samples:
        say(
            f"--epoch_samples {config.epoch_samples} from here on, and {then} before: "
            "mini-epochs and rwkv-{n}.pth are counted anew, "
            f"step {info.step} is in mini-epoch {info.meta['position']['samples'] // config.epoch_samples}"
        )
    if (then := info.meta.get("freeze", config.freeze)) != config.freeze:  # states of before have it not
        say(f"--freeze {config.freeze or 'is not given'} from here on, and {then or 'nothing was frozen'} before")
    _same_data(config, info, identity)
    model = _agree(config, model_config(**phantom.as_now(info.meta["model"])), info.path)
    return Start(model, Position(**info.meta["position"]), _warmup(config, info.meta["warmup_steps"]), state=info)


def _same_data(config: TrainConfig, info: StateInfo, identity: list[dict]) -> None:
    """UserError where other tokens lie in the place of those that the state was trained with; as many chunks of them alone do not tell."""
    for then, now in zip(info.meta["data"], identity, strict=True):
        if then["tokens"] != now["tokens"]:
            differs = f"does not hold the tokens that {info.path} was trained with"
        elif config.doc_reset and then["documents"] != now["documents"]:
            differs = (
                f"divides its tokens into {now['documents']:,} document{'s' * (now['documents'] != 1)}, "
                f"and {info.path} was trained with {then['documents']:,}"
            )
        else:
            continue
        renamed = f" (then {then['file']})" if then["file"] != now["file"] else ""
        raise UserError(
            f"--data_file: {now['file']} {differs}{renamed}: the order of the data would break; "
            "use the data of that run, or another --proj_dir with --load_model to begin anew"
        )


def _from_newest_weights(config: TrainConfig) -> Start | None:
    """The official scan; a file that cannot be read is reported and the one before it used."""
    newest, unreadable = newest_weights(config.proj_dir), []
    while newest is not None:
        path, mini_epoch = newest
        try:
            load_weights(path)
        except UserError as error:
            say(f"{error}; looking for an older one")
            unreadable.append(path)
            newest = newest_weights(config.proj_dir, unreadable)
            continue
        position = Position(samples=(mini_epoch + 1) * config.epoch_samples)
        warmup = _warmup(config, 0 if mini_epoch == INIT else WARMUP_AFTER_WEIGHTS)
        return Start(model_sizes(config, path), position, warmup, path)
    if unreadable:
        raise UserError(
            f"no checkpoint in {config.proj_dir} can be read; delete {unreadable[0].name} and the other broken ones to begin anew"
        )
    return None


def refuse_to_overwrite(config: TrainConfig, from_mini_epoch: int = 0) -> None:
    """UserError when proj_dir holds a run of which something would be lost, finished or not.

    Stages 0 and 1 are asked to begin another one.
    """
    found, cure = newest_weights(config.proj_dir), "continue it with --train_stage 3"
    if (Path(config.proj_dir) / FINAL_NAME).exists():
        held, cure = f"{FINAL_NAME}: it is finished", "train it longer with --train_stage 3 and a larger --my_exit_tokens"
    elif found is not None and found[1] >= from_mini_epoch:
        held = found[0].name
    elif from_mini_epoch == 0 and (Path(config.proj_dir) / "state" / "latest").exists():
        held = "state/"
    elif found is not None and found[1] == INIT and not is_own(found[0]) and (config.train_stage == 1 or not config.load_model):
        held = f"{INIT_NAME}, which no run in this folder has made"
    else:
        return
    raise UserError(
        f"--train_stage {config.train_stage} would overwrite the run in {config.proj_dir} (it holds {held}); "
        f"{cure}, or choose another --proj_dir"
    )


def model_sizes(config: TrainConfig, path: Path | None = None) -> ModelConfig:
    """Sizes from the checkpoint at path, where there is one, and the flags; UserError where they contradict each other."""
    if path is not None:
        found = models.read_config(load_weights(path), config.own_settings().get("rosa_bits", 0))
        if config.my_testing == "phantom" and found.model_type == "x070":
            found = _phantom_of(config, found, path)
        if config.my_testing == "hybrid" and found.model_type == "x070":
            found = model_config(**found.as_dict() | config.own_settings() | {"model_type": "hybrid"})
        return _agree(config, found, path, grows=True)
    given = {name: getattr(config, name) for name in SIZES if getattr(config, name)} | config.own_settings()
    return _flags_fit(config, model_config(config.my_testing, **given))


def _phantom_of(config: TrainConfig, found: ModelConfig, path: Path) -> PhantomConfig:
    """The Phantom that an RWKV-7 becomes: its Ghost layers are factorised matrices, whose rows come in an order of their own."""
    sizes = model_config(**found.as_dict() | config.own_settings() | {"model_type": "phantom", "ghost_permuted": True})
    if sizes.has_ghosts and sizes.ghost_activation != "identity":
        raise UserError(
            f"--ghost_activation {sizes.ghost_activation}: the matrices of the RWKV-7 in {path} "
            "can only be factorised with --ghost_activation identity"
        )
    return sizes


def _agree(config: TrainConfig, found: ModelConfig, path: Path, grows: bool = False) -> ModelConfig:
    """The model of path as the flags want it, if they may.

    grows: --load_partial may put blocks above its own; it may not with a training state, whose optimizer has none for them.
    """
    if config.my_testing != found.model_type:
        raise UserError(
            f"--my_testing {config.my_testing}, but {path} holds a model of type {found.model_type}; "
            f"use --my_testing {found.model_type}, or another --load_model or --proj_dir"
        )
    deeper = grows and bool(config.load_partial) and config.n_layer > found.n_layer
    for name in SIZES:
        given, there = getattr(config, name), getattr(found, name)
        if given and given != there and name not in found.unused and not (deeper and name == "n_layer"):
            grown = ", or add --load_partial 1, which begins the blocks above anew" if grows and name == "n_layer" and given > there else ""
            raise UserError(_differs(name, given, there, path) + grown)
    if isinstance(found, PhantomConfig):
        found = _phantom_agrees(config.own_settings(), found, path)
    if isinstance(found, HybridConfig):
        return _flags_fit(config, _hybrid_agrees(config.own_settings(), found, config.n_layer if deeper else found.n_layer, path))
    if isinstance(found, RosaConfig):
        found = _trained_as_asked(config.own_settings(), found, rosa.TRAINING_ONLY, path)
    return _flags_fit(config, found.with_(n_layer=config.n_layer) if deeper else found)


def _trained_as_asked(given: dict[str, object], found: ModelConfig, free: Collection[str], path: Path) -> ModelConfig:
    """What is there, but for the settings of `free`, which the flags may change."""
    for name, value in given.items():
        if name not in free and value != getattr(found, name):
            raise UserError(_differs(name, value, getattr(found, name), path))
    return found.with_(**{name: value for name, value in given.items() if name in free})


def _phantom_agrees(given: dict[str, object], found: PhantomConfig, path: Path) -> PhantomConfig:
    """Of the prediction head counts whether it is there, not what it was asked for."""
    there = found.has_ttt_head
    changed = _trained_as_asked(given, found.with_(ttt_head=there), (*phantom.TRAINING_ONLY, "ttt_head"), path)
    if found.steps_on_state and changed.has_ttt_head != there:
        if changed.ttt_head != there:
            raise UserError(_differs("ttt_head", changed.ttt_head, there, path))
        name = next(name for name in ("ttt_second_order", "ttt_meta") if getattr(changed, name) != getattr(found, name))
        raise UserError(
            f"--{name} 0, but {path} was trained with --{name} 1 and has a prediction head, which nothing would train now; "
            f"leave --{name} out, or add {'--ttt_meta 1' if name == 'ttt_second_order' else '--ttt_second_order 1'}"
        )
    return changed


def _hybrid_agrees(given: dict[str, object], found: HybridConfig, n_layer: int, path: Path) -> HybridConfig:
    """What is there; blocks above it, which a deeper model begins anew, have attention where the flags say so."""
    wanted = found.with_(n_layer=n_layer, **given)
    for name in given:
        there = getattr(found, name)
        same = (
            tuple(i for i in wanted.attention if i < found.n_layer) == found.attention
            if name == "attention_layers"
            else getattr(wanted, name) == there
        )
        if not same:
            raise UserError(_differs(name, given[name], there, path))
    return wanted


def _differs(name: str, given: object, there: object, path: Path) -> str:
    given, there = (int(value) if isinstance(value, bool) else value for value in (given, there))
    return f"--{name} {given}, but {path} has {there}; use --{name} {there} or leave it out, or use another --load_model or --proj_dir"


def _flags_fit(config: TrainConfig, model: ModelConfig) -> ModelConfig:
    if config.dim_att and config.dim_att != model.n_embd:
        raise UserError(
            f"--dim_att {config.dim_att} differs from the width {model.n_embd}; "
            f"--my_testing {config.my_testing} needs them equal (leave --dim_att out)"
        )
    if isinstance(model, PhantomConfig) and model.steps_on_state and config.ctx_len <= model.ttt_chunk:
        raise UserError(
            f"--ctx_len {config.ctx_len} is not above --ttt_chunk {model.ttt_chunk}: "
            "no token would come after a step, and nothing would train it; "
            f"use a longer --ctx_len, {'a smaller --ttt_chunk (16, 32, ...), ' if config.ctx_len > 16 else ''}or --ttt_enabled 0"
        )
    return model


def build_model(config: TrainConfig, sizes: ModelConfig, path: Path | None) -> models.LanguageModel:
    """The model with the weights of path; without a path its numbers are arbitrary, to be filled from a training state."""
    model = models.build(sizes)
    if path is not None:
        tensors = load_weights(path)
        if model.state_dict().keys() - tensors.keys():
            models.init_weights(model, seed_of(config) if config.load_partial or isinstance(sizes, PhantomConfig) else 0)
            tensors = models.adapted(tensors, model)
        kept = load_into(model, tensors, bool(config.load_partial))
        if kept and config.load_partial:
            say(
                f"{len(kept)} tensors are not in {path} and keep their initial values: "
                f"{', '.join(kept[:3])}{' ...' if len(kept) > 3 else ''}"
            )
    return model


def seed_of(config: TrainConfig) -> int:
    """--random_seed, or a new one, said so that the run can be repeated."""
    if config.random_seed >= 0:
        return config.random_seed
    seed = secrets.randbelow(2**31)
    say(f"initial weights from --random_seed {seed}")
    return seed


def initial_weights(config: TrainConfig, sizes: ModelConfig) -> dict[str, torch.Tensor]:
    """What rwkv-init.pth shall hold: the weights of load_model, or fresh ones."""
    model = build_model(config, sizes, Path(config.load_model) if config.load_model else None)
    if not config.load_model:
        models.init_weights(model, seed_of(config))
    return model.state_dict()
