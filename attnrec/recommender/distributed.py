"""Training the retrieval head on several processes, each with its own rows of the catalogue.

    torchrun --nproc-per-node 2 -m attnrec.recommender train --head retrieval

What there is one of per item (embeddings, features, biases, their gradients and the optimizer's state) is
spread over the processes as `attnrec.ShardedCatalog` has it; what is left of the model is the same on all of
them. Each takes its part of a batch's users, looks up their events' items wherever those are, and together
they find the cross-entropy over the whole catalogue. So a step is that of one process, but for rounding and
dropout.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from attnrec import ShardedCatalog
from attnrec.catalog import sharded_checkpoint
from attnrec.catalog.sharded_checkpoint import Saved, as_shard
from attnrec.catalog.sharded_group import Group, Sharding, disconnect

from . import checkpoint
from .checkpoint import CheckpointError
from .features import Categories, Dense, Feature
from .model import CatalogDtype, History, Retrieval, RetrievalConfig
from .tasks import RankingTask, RetrievalTask, restore
from .train import BEST, LAST, LAST_SHARDED, OneProcess, ProcessesError, State, require_same

TIMEOUT = timedelta(minutes=5)  # after which a process that waits for another one ends with an error
PER_ITEM = ("items.identity", "bias")  # parameters whose first dimension is the catalogue


@contextlib.contextmanager
def together(
    task: RetrievalTask | RankingTask, folder: Path, timeout: timedelta = TIMEOUT
) -> Iterator[Processes]:
    """In the block the processes that torchrun started have the task's model in parts; after it the task has
    the best weights of `folder`, whole. They are connected over gloo, where they are not yet.

    Raises:
        ProcessesError: it is the ranking head.
    """
    if not isinstance(task, RetrievalTask):
        raise ProcessesError("the ranking head is trained by one process: start it without torchrun")
    connected = dist.is_initialized()
    if not connected:
        dist.init_process_group("gloo", timeout=timeout)
    group = Group()
    whole, task.model = task.model, ShardedRetrieval.of(task, group)
    yield Processes(group)
    task.model = whole
    group.counts(0, torch.device("cpu"))  # rank 0 has written the best weights
    restore(task, folder)
    if not connected:  # and not after an error: the others may never come to the end
        disconnect()


class ShardedRetrieval(Retrieval):
    """`Retrieval` with this process's rows of what there is one of per item."""

    def __init__(
        self,
        config: RetrievalConfig,
        item_count: int,
        item_features: Sequence[Feature],
        levels: int,
        group: Group,
    ) -> None:
        sharding = Sharding.even(group, item_count)
        super().__init__(config, sharding.count, [_rows(x, sharding) for x in item_features], levels)
        self.sharding = sharding

    @classmethod
    def of(cls, task: RetrievalTask, group: Group) -> ShardedRetrieval:
        """The task's model, cut for these processes."""
        encoded = task.encoded
        model = cls(
            task.config,
            len(encoded.data.item_names),
            encoded.item_features,
            len(encoded.thresholds) + 1,
            group,
        )
        model.load_state_dict(model.own(task.model.state_dict()))
        return model

    def own(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """This process's part of the weights of a `Retrieval`."""
        rows = slice(self.sharding.first, self.sharding.last)
        return {name: x[rows] if name in PER_ITEM else x for name, x in whole.items()}

    def whole(self) -> dict[str, Tensor]:
        """The weights of a `Retrieval`, on every process. A collective."""
        starts = self.sharding.starts
        counts = [last - first for first, last in itertools.pairwise(starts)]
        gather = self.sharding.group.gather_rows
        return {name: gather(x, counts) if name in PER_ITEM else x for name, x in self.state_dict().items()}

    def loss(self, history: History, targets: Tensor) -> Tensor:
        """Of all processes' positions, the same on each; `history` and `targets` are this one's."""
        items = self._items()
        states = self._states(*_looked_up(history, items, own=True))
        return items.cross_entropy(states, targets, bias=self.bias, own_users=True)

    @torch.no_grad()
    def catalog(self, dtype: CatalogDtype = "fp32") -> ShardedCatalog:
        return self._items(dtype)

    def recommend(
        self, history: History, k: int, exclude: tuple[Tensor, Tensor], catalog: ShardedCatalog
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same users on all processes."""
        states = self._last_states(*_looked_up(history, catalog))
        return catalog.topk(states, k, exclude=exclude, bias=self.bias)

    def next_loss(self, history: History, targets: Tensor) -> Tensor:
        """The same users on all processes."""
        items = self._items()
        states = self._last_states(*_looked_up(history, items))
        return items.cross_entropy(states, targets, bias=self.bias, reduction="none")

    def _items(self, dtype: CatalogDtype = "fp32") -> ShardedCatalog:
        return ShardedCatalog(as_shard(self.items(), self.sharding), dtype=dtype)


def _looked_up(history: History, items: ShardedCatalog, own: bool = False) -> tuple[History, Tensor]:
    """A history whose items are numbers of its own events, and the events' vectors."""
    events = items.lookup(history.items, own_ids=own)
    return history._replace(items=torch.arange(len(events))), events


def _rows(feature: Feature, sharding: Sharding) -> Feature:
    """A feature of this process's items."""
    if isinstance(feature, Dense):
        return replace(feature, values=feature.values[sharding.first : sharding.last])
    offsets = feature.offsets[sharding.first : sharding.last + 1]
    values = feature.values[offsets[0] : offsets[-1]]
    return Categories(values, offsets - offsets[0], feature.words)


class Processes(OneProcess):
    """Several processes that train a `ShardedRetrieval` together."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def part(self, batch: tuple[History, Tensor]) -> tuple[History, Tensor]:
        """Of the users, as many as the other processes have, one more or less."""
        history, targets = batch
        users = len(history.offsets) - 1
        first, last = (users * rank // self.group.size for rank in (self.group.rank, self.group.rank + 1))
        offsets = history.offsets[first : last + 1]
        events = slice(int(offsets[0]), int(offsets[-1]))
        own = History(history.items[events], history.levels[events], offsets - offsets[0])
        return own, targets[events]

    def start_epoch(self, seed: int, epoch: int) -> None:
        """Each process its own dropout, which depends on nothing that would have to be saved."""
        torch.manual_seed((seed * 100_003 + epoch) * 100_003 + self.group.rank)

    def clip(self, model: nn.Module, largest: float) -> None:
        shared = []
        squares = torch.zeros(())
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if name in PER_ITEM:  # complete: the loss is that of all processes' users
                squares = squares + parameter.grad.square().sum()
            else:
                shared.append(parameter.grad)
        squares = self.group.sum(squares)
        summed = self.group.sum(torch.cat([grad.reshape(-1) for grad in shared]))
        for grad, part in zip(shared, summed.split([grad.numel() for grad in shared]), strict=True):
            grad.copy_(part.view_as(grad))
        norm = (squares + summed.square().sum()).sqrt()
        nn.utils.clip_grads_with_norm_(model.parameters(), largest, norm)

    def save_last(self, folder: Path, state: State, description: dict[str, Any]) -> None:
        tensors = state.tensors()
        shards = {name: tensors.pop(name) for name in self._per_item(state, tensors)}
        saved = {"description": description, "rows": state.rows, "step": state.step}
        sharded_checkpoint.save(folder / LAST_SHARDED, Saved(saved, state.model.sharding, shards, tensors))
        if self.group.rank == 0:
            (folder / LAST).unlink(missing_ok=True)  # of another run

    def load_last(self, folder: Path, state: State, description: dict[str, Any]) -> None:
        place = folder / LAST_SHARDED
        if (folder / LAST).exists():
            raise CheckpointError(f"{folder / LAST}: made by one process: go on without torchrun")
        if not (place / sharded_checkpoint.CURRENT).exists():
            return
        saved = sharded_checkpoint.load(place, self.group)
        require_same(place, saved.description["description"], description)
        state.restore(place, saved.shards | saved.others, saved.description)

    def save_best(self, folder: Path, model: nn.Module, description: dict[str, Any]) -> None:
        """The file that one process would have written."""
        whole = model.whole()
        if self.group.rank == 0:
            checkpoint.save_checkpoint(folder / BEST, whole, description)

    def load_best(self, folder: Path, model: nn.Module) -> None:
        self.group.counts(0, torch.device("cpu"))  # it is written
        tensors, _ = checkpoint.load_checkpoint(folder / BEST)
        checkpoint.load_weights(folder / BEST, model, model.own(tensors))

    def _per_item(self, state: State, tensors: dict[str, Tensor]) -> list[str]:
        """The names of what is spread over the processes."""
        spread = {id(x) for name, x in state.model.named_parameters() if name in PER_ITEM}
        parameters = [x for group in state.optimizer.param_groups for x in group["params"]]
        prefixes = tuple(f"optimizer.{n}.exp" for n, x in enumerate(parameters) if id(x) in spread)
        weights = {f"{of}.{name}" for of in ("model", "averaged") for name in PER_ITEM}
        return [name for name in tensors if name in weights or name.startswith(prefixes)]
