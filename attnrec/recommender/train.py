"""The training loop of both heads: early stopping, averaged weights, and checkpoints to go on from.

After every epoch the folder holds `last.safetensors`, all that the next epoch depends on (weights, averages,
optimizer, random states), and `best.safetensors`, the weights to use. A run that was killed and goes on
from `last` gets the same weights, bitwise, as one that was not. What is different where several processes
train one model (`Task.processes`) is in `distributed.py`.
"""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import checkpoint
from .checkpoint import CheckpointError, part, prefixed

BEST, LAST, LAST_SHARDED = "best.safetensors", "last.safetensors", "last"


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
    processes: OneProcess  # that train it together
    description: dict[str, Any]  # what another run must agree with to go on from a checkpoint
    vocabulary: dict[str, Any]  # the names of its rows, kept with the best weights

    def batches(self, size: int, random: torch.Generator) -> Iterator[Any]: ...

    def loss(self, batch: Any) -> Tensor: ...

    def validate(self, model: nn.Module) -> dict[str, float]: ...


Report = Callable[[dict[str, float]], None]


@dataclass
class State:
    """All that the next step depends on, but for the random state of dropout."""

    model: nn.Module
    averaged: nn.Module
    optimizer: torch.optim.Optimizer
    order: torch.Generator  # of the batches
    rows: list[dict[str, float]] = field(default_factory=list)  # of the epochs so far
    step: int = 0

    def tensors(self) -> dict[str, Tensor]:
        return {
            **prefixed("model", self.model.state_dict()),
            **prefixed("averaged", self.averaged.state_dict()),
            **prefixed("optimizer", checkpoint.optimizer_tensors(self.optimizer)),
            "random.order": self.order.get_state(),
        }

    def restore(self, path: Path, tensors: dict[str, Tensor], saved: dict[str, Any]) -> None:
        self.rows, self.step = saved["rows"], saved["step"]
        checkpoint.load_weights(path, self.model, part("model", tensors))
        checkpoint.load_weights(path, self.averaged, part("averaged", tensors))
        checkpoint.restore_optimizer(self.optimizer, part("optimizer", tensors))
        self.order.set_state(tensors["random.order"])


class OneProcess:
    """What the loop and the tasks leave to this: who computes what, the gradients, and the files."""

    def own(self, users: int) -> slice:
        """Which of so many users this process computes."""
        return slice(0, users)

    def part(self, batch: Any) -> Any:
        """What this process computes of a batch."""
        return batch

    def mean(self, x: Tensor) -> Tensor:
        """Over the rows of all processes; the gradient is that of this one's."""
        return x.mean(0)

    def start_epoch(self, seed: int, epoch: int) -> None:
        """Before the epoch's first batch; dropout's random state just goes on."""

    def clip(self, model: nn.Module, largest: float) -> None:
        """Completes the gradients and clips their norm."""
        nn.utils.clip_grad_norm_(model.parameters(), largest)

    def save_last(self, folder: Path, state: State, description: dict[str, Any]) -> None:
        tensors = {**state.tensors(), "random.dropout": torch.get_rng_state()}
        saved = {"description": description, "rows": state.rows, "step": state.step}
        checkpoint.save_checkpoint(folder / LAST, tensors, saved)
        shutil.rmtree(folder / LAST_SHARDED, ignore_errors=True)  # of another run

    def load_last(self, folder: Path, state: State, description: dict[str, Any]) -> None:
        """Goes on from the last epoch, where there is one."""
        last = folder / LAST
        if (folder / LAST_SHARDED).exists():
            raise CheckpointError(
                f"{folder / LAST_SHARDED}: made under torchrun: go on under it, with any number of processes"
            )
        if last.exists():
            tensors, saved = checkpoint.load_checkpoint(last)
            require_same(last, saved["description"], description)
            state.restore(last, tensors, saved)
            torch.set_rng_state(tensors["random.dropout"])

    def save_best(self, folder: Path, model: nn.Module, description: dict[str, Any]) -> None:
        checkpoint.save_checkpoint(folder / BEST, model.state_dict(), description)

    def load_best(self, folder: Path, model: nn.Module) -> None:
        tensors, _ = checkpoint.load_checkpoint(folder / BEST)
        checkpoint.load_weights(folder / BEST, model, tensors)


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
        resume: go on from the folder's last checkpoint where there is one.
        on_step: is called with the epoch's step number and how many it has.
        on_epoch: is called with the epoch's row: epoch, loss, seconds and the validation metrics.

    Returns:
        The rows of all epochs.

    Raises:
        CheckpointError: the checkpoint to go on from belongs to another configuration.
    """
    torch.manual_seed(config.seed)
    processes = task.processes
    random = torch.Generator().manual_seed(config.seed)
    state = State(task.model, copy.deepcopy(task.model), _optimizer(task.model, config), random)
    # a run that stopped may go on with more patience: that changes no weights
    settings = {name: value for name, value in asdict(config).items() if name != "patience"}
    description = {**task.description, "metric": task.metric, "train": settings}
    if resume:
        processes.load_last(folder, state, description)

    while not _finished(state.rows, task.metric, config):
        started = time.perf_counter()
        epoch = len(state.rows)
        task.model.train()
        processes.start_epoch(config.seed, epoch)
        batches = list(task.batches(config.batch_users, random))
        total = 0.0
        for number, batch in enumerate(batches):
            _set_learning_rate(state.optimizer, config, state.step, config.epochs * len(batches))
            loss = task.loss(processes.part(batch))
            state.optimizer.zero_grad()
            loss.backward()
            processes.clip(task.model, config.clip)
            state.optimizer.step()
            state.step += 1
            _average(state.averaged, task.model, min(config.average, state.step / (state.step + 10)))
            total += loss.item()
            on_step(number + 1, len(batches))
        state.averaged.eval()
        metrics = task.validate(state.averaged)
        seconds = time.perf_counter() - started
        state.rows.append({"epoch": epoch, "loss": total / len(batches), **metrics, "seconds": seconds})
        if _best(state.rows, task.metric) == epoch:
            kept = {"description": description, "row": state.rows[-1], "vocabulary": task.vocabulary}
            processes.save_best(folder, state.averaged, kept)
        processes.save_last(folder, state, description)
        on_epoch(state.rows[-1])

    processes.load_best(folder, task.model)
    task.model.eval()
    return state.rows


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


def require_same(path: Path, saved: Any, wanted: Any) -> None:
    for key in sorted(saved.keys() | wanted.keys()):
        if saved.get(key) != wanted.get(key):
            raise CheckpointError(
                f"{path}: made with {key} = {saved.get(key)}, this run has {wanted.get(key)}; "
                "train afresh, or into another folder"
            )
