"""Training on several processes, each of which takes its part of every batch's users.

    torchrun --nproc-per-node 2 -m attnrec.recommender -- train

Of the retrieval head what there is one of per item (embeddings, features, biases, their gradients and the
optimizer's state) is spread over the processes as `attnrec.ShardedCatalog` has it: each looks up its events'
items wherever those are, and together they find the cross-entropy over the whole catalogue. What is left of
the model is the same on all of them, and so is all of the ranking head: their gradients are added up, from
rank 0 upwards, so that every process makes the same step to the bit. (`DistributedDataParallel` promises no
order, and averages the processes' means, which is not the mean over candidates: users have more and fewer.)
So a step is that of one process, but for rounding and dropout.
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
from attnrec.catalog.sharded_group import Group, Sharding, SumOverRanks, disconnect

from . import checkpoint
from .checkpoint import CheckpointError
from .features import Categories, Dense, Feature
from .model import CatalogDtype, History, Retrieval, RetrievalConfig
from .tasks import RankingBatch, RankingTask, RetrievalTask, restore
from .train import BEST, LAST, LAST_SHARDED, OneProcess, State, require_same

TIMEOUT = timedelta(minutes=5)  # after which a process that waits for another one ends with an error
PER_ITEM = ("items.identity", "bias")  # parameters whose first dimension is the catalogue


@contextlib.contextmanager
def connected(timeout: timedelta = TIMEOUT) -> Iterator[None]:
    """In the block the processes that torchrun started are connected, over gloo where they are not yet. Once
    for all that a process does: what the first connection left with torchrun would mislead a second one.
    """
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", timeout=timeout)
    yield
    disconnect()  # and not after an error: the others may never come to the end


@contextlib.contextmanager
def together(
    task: RetrievalTask | RankingTask, folder: Path, timeout: timedelta = TIMEOUT
) -> Iterator[Processes]:
    """In the block the processes that torchrun started train the task together; after it the task has the
    best weights of `folder`, whole.
    """
    with connected(timeout):
        group = Group()
        whole = task.model
        if isinstance(task, RetrievalTask):
            task.model, task.processes = ShardedRetrieval.of(task, group), ShardedProcesses(group)
        else:
            task.processes = Processes(group)
        yield task.processes
        task.model, task.processes = whole, OneProcess()
        group.counts(0, torch.device("cpu"))  # rank 0 has written the best weights
        restore(task, folder)


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
    """Several processes that train one model together, which is the same on each."""

    per_item: tuple[str, ...] = ()  # parameters that are spread over the processes instead

    def __init__(self, group: Group) -> None:
        self.group = group

    def own(self, users: int) -> slice:
        """As many as the other processes have, one more or less."""
        rank, ranks = self.group.rank, self.group.size
        return slice(users * rank // ranks, users * (rank + 1) // ranks)

    def part(self, batch: RankingBatch) -> RankingBatch:
        return batch.part(self.own(batch.users))

    def mean(self, x: Tensor) -> Tensor:
        sums = SumOverRanks.apply(torch.cat((x.sum(0), x.new_tensor([len(x)]))), self.group)
        return sums[:-1] / sums[-1]

    def sharding(self, model: nn.Module) -> Sharding:
        """Of what is spread."""
        return Sharding.even(self.group, 0)

    def own_weights(self, model: nn.Module, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """This process's part of a whole model's weights."""
        return whole

    def whole_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """A whole model's weights, on every process. A collective."""
        return model.state_dict()

    def start_epoch(self, seed: int, epoch: int) -> None:
        """Each process its own dropout, which depends on nothing that would have to be saved."""
        torch.manual_seed((seed * 100_003 + epoch) * 100_003 + self.group.rank)

    def clip(self, model: nn.Module, largest: float) -> None:
        shared = []
        squares = torch.zeros(())
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if name in self.per_item:  # complete: the loss is that of all processes' users
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
        sharded_checkpoint.save(
            folder / LAST_SHARDED, Saved(saved, self.sharding(state.model), shards, tensors)
        )
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
        whole = self.whole_weights(model)
        if self.group.rank == 0:
            checkpoint.save_checkpoint(folder / BEST, whole, description)

    def load_best(self, folder: Path, model: nn.Module) -> None:
        self.group.counts(0, torch.device("cpu"))  # it is written
        tensors, _ = checkpoint.load_checkpoint(folder / BEST)
        checkpoint.load_weights(folder / BEST, model, self.own_weights(model, tensors))

    def _per_item(self, state: State, tensors: dict[str, Tensor]) -> list[str]:
        """The names of what is spread over the processes."""
        spread = {id(x) for name, x in state.model.named_parameters() if name in self.per_item}
        parameters = [x for group in state.optimizer.param_groups for x in group["params"]]
        prefixes = tuple(f"optimizer.{n}.exp" for n, x in enumerate(parameters) if id(x) in spread)
        weights = {f"{of}.{name}" for of in ("model", "averaged") for name in self.per_item}
        return [name for name in tensors if name in weights or name.startswith(prefixes)]


class ShardedProcesses(Processes):
    """Several processes that train a `ShardedRetrieval` together."""

    per_item = PER_ITEM

    def part(self, batch: tuple[History, Tensor]) -> tuple[History, Tensor]:
        history, targets = batch
        own = self.own(len(history.offsets) - 1)
        first, last = history.offsets[[own.start, own.stop]].tolist()
        return history.part(own), targets[first:last]

    def sharding(self, model: ShardedRetrieval) -> Sharding:
        return model.sharding

    def own_weights(self, model: ShardedRetrieval, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        return model.own(whole)

    def whole_weights(self, model: ShardedRetrieval) -> dict[str, Tensor]:
        return model.whole()
