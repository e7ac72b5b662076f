"""Checkpoints of tensors that are spread over ranks, by torch.distributed.checkpoint: each rank writes its
own rows, and any number of ranks reads them back.

A folder holds one sub-folder for each checkpoint, with safetensors files of the ranks (no pickles) and a list
of what is in them, and the file `current`, which names the newest complete one. It is replaced as the last
thing, so that a write which fails or is killed on any rank leaves the old checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from attnrec.catalog.sharded_group import Group, Sharding
from attnrec.files import write_file

CURRENT, CONTENT = "current", "content.json"


class ShardedCheckpointError(RuntimeError):
    """A checkpoint that could not be written or read, or is of other tensors."""


class Saved(NamedTuple):
    """What a checkpoint holds."""

    description: dict[str, Any]  # what JSON can hold
    sharding: Sharding
    shards: dict[str, Tensor]  # this rank's rows of tensors that are spread over the ranks as `sharding` says
    others: dict[str, Tensor]  # the same on all ranks


def save(folder: Path, saved: Saved) -> None:
    """Writes a checkpoint and then removes the one before. A collective; rank 0's description is kept.

    Raises:
        ShardedCheckpointError: on every rank, where any of them could not write; the old checkpoint is still
            there then.
    """
    group = saved.sharding.group
    # rank 0 alone looks at the disk, where others may see later what it holds
    number = group.counts(_number(folder) + 1, torch.device("cpu"))[0]
    place = folder / f"{number:06}"
    if group.rank == 0:
        shutil.rmtree(place, ignore_errors=True)  # what a killed write left
        place.mkdir(parents=True)
    group.counts(0, torch.device("cpu"))  # the folder is there before anyone writes into it
    with _in_words(f"{folder} could not be written"):
        dcp.save(
            _state(saved),
            storage_writer=dcp.HuggingFaceStorageWriter(str(place), save_distributed=True),
            process_group=group.process_group,
            no_dist=not _started(),
        )
    said = None
    if group.rank == 0:
        rows = saved.sharding.total
        content = {
            "description": saved.description,
            "rows": rows,
            "shards": {name: _kind(x, rows) for name, x in saved.shards.items()},
            "others": {name: _kind(x) for name, x in saved.others.items()},
        }
        try:
            write_file(place / CONTENT, json.dumps(content).encode())
            write_file(folder / CURRENT, place.name.encode())
            for old in folder.iterdir():
                if old.is_dir() and old.name.isdigit() and old != place:
                    shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            said = error
    if any(group.counts(said is not None, torch.device("cpu"))):
        raise ShardedCheckpointError(f"{folder} could not be written: on rank 0 {said or 'it failed'}")


def load(folder: Path, group: Group, device: torch.device | str = "cpu") -> Saved:
    """The newest complete checkpoint, cut evenly for these ranks, however many had written it. A collective.

    Raises:
        FileNotFoundError: there is none.
        ShardedCheckpointError: on every rank, where any of them could not read its part.
    """
    if _number(folder) < 0:
        raise FileNotFoundError(f"no checkpoint in {folder}")
    place = folder / (folder / CURRENT).read_text()
    content = json.loads((place / CONTENT).read_text())
    sharding = Sharding.even(group, content["rows"])

    def empty(kind: dict[str, Any], rows: int | None = None) -> Tensor:
        shape = kind["shape"] if rows is None else [rows, *kind["shape"][1:]]
        return torch.empty(shape, dtype=getattr(torch, kind["dtype"]), device=device)

    saved = Saved(
        content["description"],
        sharding,
        {name: empty(kind, sharding.count) for name, kind in content["shards"].items()},
        {name: empty(kind) for name, kind in content["others"].items()},
    )
    with _in_words(f"{place} could not be read"):
        dcp.load(
            _state(saved),
            storage_reader=dcp.HuggingFaceStorageReader(str(place)),
            process_group=group.process_group,
            no_dist=not _started(),
        )
    return saved


def as_shard(own: Tensor, sharding: Sharding) -> Tensor:
    """This rank's part `[n, ...]` as a DTensor of the whole, cut evenly (`Sharding.even`). No copy."""
    group = sharding.group
    if not _started():
        return own
    mesh = DeviceMesh.from_group(group.process_group or dist.group.WORLD, own.device.type)
    shape = torch.Size((sharding.total, *own.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def evenly(rows: Tensor, sharding: Sharding) -> tuple[Tensor, Sharding]:
    """The rows moved between ranks so that they are cut evenly. A collective."""
    even = Sharding.even(sharding.group, sharding.total)
    if even.starts == sharding.starts:
        return rows, sharding

    def overlap(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
        first = max(a[0], b[0])
        return first, max(first, min(a[1], b[1]))

    def bounds(of: Sharding) -> list[tuple[int, int]]:
        return list(zip(of.starts[:-1], of.starts[1:], strict=True))

    rank = sharding.group.rank
    sent = [overlap(bounds(sharding)[rank], new) for new in bounds(even)]
    got = [overlap(old, bounds(even)[rank]) for old in bounds(sharding)]
    parts = [
        rows[first - sharding.first : last - sharding.first] if last > first else rows[:0]
        for first, last in sent
    ]
    moved = sharding.group.exchange(parts, [last - first for first, last in got])
    return torch.cat(moved), even


@contextlib.contextmanager
def _in_words(what: str) -> Iterator[None]:
    """PyTorch's own exception is no Exception, and would pass by whoever handles one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is meant
        try:
            yield
        except CheckpointException as error:
            rank, (failure, _) = next(iter(error.failures.items()))
            raise ShardedCheckpointError(f"{what}: on rank {rank} {failure!r}") from error


def _started() -> bool:
    return dist.is_available() and dist.is_initialized()


def _state(saved: Saved) -> dict[str, Tensor]:
    """As torch.distributed.checkpoint takes it: without tensors that have no elements, or no dimension."""
    shards = {name: as_shard(x, saved.sharding) for name, x in saved.shards.items()}
    others = {name: x.view(1) if x.ndim == 0 else x for name, x in saved.others.items()}
    return {name: x for name, x in (shards | others).items() if x.numel()}


def _kind(x: Tensor, rows: int | None = None) -> dict[str, Any]:
    shape = list(x.shape) if rows is None else [rows, *x.shape[1:]]
    return {"shape": shape, "dtype": str(x.dtype).removeprefix("torch.")}


def _number(folder: Path) -> int:
    """Of the newest complete checkpoint; -1 without one."""
    path = folder / CURRENT
    return int(path.read_text()) if path.exists() else -1
