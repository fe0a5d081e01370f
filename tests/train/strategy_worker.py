"""Run by torchrun from the tests: trains a tiny model under one configuration after another in the same processes.

argv[1]: a JSON file, a list of jobs; every job is a dict of TrainConfig fields plus steps, and optionally save_at, resume, noise.
Rank 0 writes argv[2]: one result per job.
"""

import hashlib
import json
import logging
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch.nn import functional as F

from rwkvlm import models
from rwkvlm.checkpoint import gather, ledger, ranks, state
from rwkvlm.config import ModelConfig, TrainConfig
from rwkvlm.train.optimizer import make_optimizer
from rwkvlm.train.strategy import launch, lightning_precision, make_strategy, param_dtype

GLOBAL_BATCH = 4
T = 12
warnings.filterwarnings("ignore")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


def sample(ii: int) -> torch.Tensor:
    return torch.randint(48, (T + 1,), generator=torch.Generator().manual_seed(ii))


class Module(pl.LightningModule):
    def __init__(self, config: TrainConfig, job: dict) -> None:
        super().__init__()
        self.config, self.job = config, job
        self.net = models.build(ModelConfig(n_layer=2, n_embd=32, vocab_size=48, head_size=16))
        models.init_weights(self.net, 2 if job.get("resume") else 1)  # a state must bring everything along
        with torch.no_grad():  # zero matrices would hide errors
            for i, p in enumerate(self.net.parameters()):
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        self.net.to(param_dtype(config))
        self.first, self.losses = 0, []

    def configure_optimizers(self):
        return make_optimizer(self.net, self.config, self.trainer.strategy)

    def on_train_start(self):
        if self.job.get("resume"):
            info = state.find_state(self.config.proj_dir)
            state.load_state(info, self.net, self.trainer.strategy.optimizers[0])
            self.first = info.meta["steps"]

    def training_step(self, batch, batch_idx):
        rank, world = self.trainer.global_rank, self.trainer.world_size
        accumulate = self.config.accumulate_grad_batches
        step, micro = divmod(batch_idx, accumulate)
        per_rank = GLOBAL_BATCH // world // accumulate
        start = 1 + (self.first + step) * GLOBAL_BATCH + (micro * world + rank) * per_rank
        tokens = torch.stack([sample(ii) for ii in range(start, start + per_rank)])
        noise = 1 + 0.01 * torch.rand(()) if self.job.get("noise") else 1.0
        logits = self.net(tokens[:, :-1]).float()
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) * noise
        mean = loss.detach().clone()
        if world > 1:
            torch.distributed.all_reduce(mean)
        self.losses.append(mean.item() / world)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if (batch_idx + 1) % self.config.accumulate_grad_batches == 0:
            step = self.first + (batch_idx + 1) // self.config.accumulate_grad_batches
            if step in self.job.get("save_at", ()):
                ledger.publish_weights(self.config.proj_dir, "rwkv-0.pth", gather.full_weights(self.net))
                state.write(
                    self.config.proj_dir,
                    step,
                    state.capture(self.net, self.trainer.strategy.optimizers[0]),
                    {"steps": step},
                    self.config.keep_last,
                )


def run(job: dict) -> dict:
    own = ("steps", "save_at", "resume", "noise")
    config = TrainConfig(
        accelerator="cpu", lr_init=1e-2, weight_decay=0.1, ds_bucket_mb=1, **{k: v for k, v in job.items() if k not in own}
    )
    torch.manual_seed(100 + ranks.rank())
    module = Module(config, job)
    strategy = make_strategy(config)
    where = launch(config)
    trainer = pl.Trainer(
        accelerator=where.accelerator,
        devices=where.devices,
        num_nodes=where.num_nodes,
        strategy=strategy,
        precision=lightning_precision(config),
        gradient_clip_val=config.grad_clip,
        max_steps=job["steps"],
        max_epochs=1,
        accumulate_grad_batches=config.accumulate_grad_batches,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.arange(10_000), batch_size=None))
    numbers = hashlib.sha256()
    for name, entry in sorted(state.capture(module.net, trainer.strategy.optimizers[0]).content["tensors"].items()):
        numbers.update(f"{name} {entry['start']} {entry['step']}".encode())
        for key in sorted(entry.keys() - {"start", "step"}):
            numbers.update(entry[key].view(torch.uint8).numpy().tobytes())
    return {"losses": module.losses, "numbers": ranks.gather(numbers.hexdigest())}


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = [run(job) for job in json.loads(Path(sys.argv[1]).read_text())]
    if ranks.rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
