"""The training loop of both heads: early stopping, averaged weights, and checkpoints to go on from.

After every epoch the folder holds `last.safetensors`, all that the next epoch depends on (weights, averages,
optimizer, random states), and `best.safetensors`, the weights to use. A run that was killed and goes on
from `last` gets the same weights, bitwise, as one that was not.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import checkpoint
from .checkpoint import CheckpointError, part, prefixed


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = 20
    patience: int = 5  # epochs without a better validation metric before the end
    batch_users: int = 8
    learning_rate: float = 1e-3  # falls to 0 over the epochs by a cosine
    warmup_steps: int = 50
    weight_decay: float = 0.0  # of matrices
    embedding_decay: float = 0.0
    average: float = 0.98  # decay of the exponential moving average of the weights, which is what is kept
    clip: float = 5.0  # largest norm of the gradient
    seed: int = 0


class Task(Protocol):
    """What a head brings to the loop."""

    name: str
    metric: str  # of validate(), higher is better
    model: nn.Module
    description: dict[str, Any]  # what another run must agree with to go on from a checkpoint

    def batches(self, size: int, random: torch.Generator) -> Iterator[Any]: ...

    def loss(self, batch: Any) -> Tensor: ...

    def validate(self, model: nn.Module) -> dict[str, float]: ...


Report = Callable[[dict[str, float]], None]


def fit(
    task: Task,
    config: TrainConfig,
    folder: Path,
    *,
    resume: bool = False,
    on_step: Callable[[int, int], None] = lambda step, steps: None,
    on_epoch: Report = lambda row: None,
) -> list[dict[str, float]]:
    """Trains until validation stops improving and leaves the best averaged weights in `task.model`.

    Args:
        resume: go on from `folder/last.safetensors` where there is one.
        on_step: is called with the epoch's step number and how many it has.
        on_epoch: is called with the epoch's row: epoch, loss, seconds and the validation metrics.

    Returns:
        The rows of all epochs.

    Raises:
        CheckpointError: the checkpoint to go on from belongs to another configuration.
    """
    torch.manual_seed(config.seed)
    random = torch.Generator().manual_seed(config.seed)
    averaged = copy.deepcopy(task.model)
    optimizer = _optimizer(task.model, config)
    # a run that stopped may go on with more patience: that changes no weights
    settings = {name: value for name, value in asdict(config).items() if name != "patience"}
    description = {**task.description, "metric": task.metric, "train": settings}
    rows: list[dict[str, float]] = []
    step = 0
    last = folder / "last.safetensors"
    if resume and last.exists():
        tensors, saved = checkpoint.load_checkpoint(last)
        _require_same(last, saved["description"], description)
        rows, step = saved["rows"], saved["step"]
        checkpoint.load_weights(last, task.model, part("model", tensors))
        checkpoint.load_weights(last, averaged, part("averaged", tensors))
        checkpoint.restore_optimizer(optimizer, part("optimizer", tensors))
        torch.set_rng_state(tensors["random.dropout"])
        random.set_state(tensors["random.order"])

    while not _finished(rows, task.metric, config):
        started = time.perf_counter()
        task.model.train()
        batches = list(task.batches(config.batch_users, random))
        total = 0.0
        for number, batch in enumerate(batches):
            _set_learning_rate(optimizer, config, step, config.epochs * len(batches))
            loss = task.loss(batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(task.model.parameters(), config.clip)
            optimizer.step()
            step += 1
            _average(averaged, task.model, min(config.average, step / (step + 10)))
            total += loss.item()
            on_step(number + 1, len(batches))
        averaged.eval()
        metrics = task.validate(averaged)
        seconds = time.perf_counter() - started
        rows.append({"epoch": len(rows), "loss": total / len(batches), **metrics, "seconds": seconds})
        if _best(rows, task.metric) == len(rows) - 1:
            kept = {"description": description, "row": rows[-1]}
            checkpoint.save_checkpoint(folder / "best.safetensors", averaged.state_dict(), kept)
        tensors = {
            **prefixed("model", task.model.state_dict()),
            **prefixed("averaged", averaged.state_dict()),
            **prefixed("optimizer", checkpoint.optimizer_tensors(optimizer)),
            "random.dropout": torch.get_rng_state(),
            "random.order": random.get_state(),
        }
        checkpoint.save_checkpoint(last, tensors, {"description": description, "rows": rows, "step": step})
        on_epoch(rows[-1])

    best = folder / "best.safetensors"
    tensors, _ = checkpoint.load_checkpoint(best)
    checkpoint.load_weights(best, task.model, tensors)
    task.model.eval()
    return rows


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Adam with the decay in the gradient, not decoupled.

    Adam's fixed point is then the minimum of loss + decay/2·|w|², which draws an item in towards 0 by how few
    events it has. Decoupled decay does not, and rare items overfit: see docs/recommender.md.
    """
    embeddings, matrices, others = [], [], []
    for name, parameter in model.named_parameters():
        if name.split(".")[0] in ("users", "items", "user_bias", "item_bias"):
            embeddings.append(parameter)
        elif parameter.ndim > 1:
            matrices.append(parameter)
        else:
            others.append(parameter)
    groups = [
        {"params": embeddings, "weight_decay": config.embedding_decay},
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.Adam(groups, lr=config.learning_rate)


def _set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int, steps: int) -> None:
    warmup = min(1.0, (step + 1) / config.warmup_steps)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def _average(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    for kept, new in zip(averaged.parameters(), model.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)


def _best(rows: list[dict[str, float]], metric: str) -> int:
    """The number of the best epoch, the earlier of two equal ones."""
    return max(range(len(rows)), key=lambda number: (rows[number][metric], -number))


def _finished(rows: list[dict[str, float]], metric: str, config: TrainConfig) -> bool:
    if not rows:
        return False
    return len(rows) >= config.epochs or len(rows) - 1 - _best(rows, metric) >= config.patience


def _require_same(path: Path, saved: Any, wanted: Any) -> None:
    for key in sorted(saved.keys() | wanted.keys()):
        if saved.get(key) != wanted.get(key):
            raise CheckpointError(
                f"{path}: made with {key} = {saved.get(key)}, this run has {wanted.get(key)}; "
                "train afresh, or into another folder"
            )
