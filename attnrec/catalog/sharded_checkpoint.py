"""Checkpoints of tensors that are spread over ranks, by torch.distributed.checkpoint: each rank writes its
own rows, and any number of ranks reads them back.

A folder holds one sub-folder for each checkpoint, with safetensors files of the ranks (no pickles) and a
description, and the file `current`, which names the newest complete one. It is replaced as the last thing,
so that a write which fails or is killed on any rank leaves the old checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from attnrec.catalog.sharded_group import Group, Sharding
from attnrec.files import write_file

CURRENT, DESCRIPTION = "current", "description.json"


class ShardedCheckpointError(RuntimeError):
    """A checkpoint that could not be written or read, or is of other tensors."""


def save(folder: Path, tensors: dict[str, Tensor], description: dict[str, Any], group: Group) -> None:
    """Writes a checkpoint and then removes the one before. A collective.

    Args:
        tensors: on each rank under the same names; a DTensor (see `as_shard`) is spread over the ranks, any
            other tensor is the same on all of them.
        description: what JSON can hold; rank 0's is kept.

    Raises:
        ShardedCheckpointError: on every rank, where any of them could not write; the old checkpoint is still
            there then.
    """
    before = _current(folder)
    name = f"{0 if before is None else int(before) + 1:06}"
    # rank 0 alone looks at the disk, where others may see it later
    name = f"{group.counts(int(name), torch.device('cpu'))[0]:06}"
    place = folder / name
    if group.rank == 0:
        shutil.rmtree(place, ignore_errors=True)  # what a killed write left
        place.mkdir(parents=True)
    group.counts(0, torch.device("cpu"))  # the folder is there before anyone writes into it
    with _in_words(f"{folder} could not be written"):
        dcp.save(
            {key: _at_least_1d(x) for key, x in tensors.items()},
            storage_writer=dcp.HuggingFaceStorageWriter(str(place), save_distributed=True),
            process_group=group.process_group,
            no_dist=not _started(),
        )
    said = None
    if group.rank == 0:
        try:
            write_file(place / DESCRIPTION, json.dumps(description).encode())
            write_file(folder / CURRENT, name.encode())
            for old in folder.iterdir():
                if old.is_dir() and old.name.isdigit() and old.name != name:
                    shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            said = error
    if any(group.counts(said is not None, torch.device("cpu"))):
        raise ShardedCheckpointError(f"{folder} could not be written: on rank 0 {said or 'it failed'}")


def read_description(folder: Path) -> dict[str, Any]:
    """The description of the newest complete checkpoint.

    Raises:
        FileNotFoundError: there is none.
    """
    name = _current(folder)
    if name is None:
        raise FileNotFoundError(f"no checkpoint in {folder}")
    return json.loads((folder / name / DESCRIPTION).read_text())


def load(folder: Path, tensors: dict[str, Tensor], group: Group) -> None:
    """Fills `tensors`, DTensors or others as in `save`, in place. A collective."""
    name = _current(folder)
    if name is None:
        raise FileNotFoundError(f"no checkpoint in {folder}")
    reader = dcp.HuggingFaceStorageReader(str(folder / name))
    held = reader.read_metadata().state_dict_metadata
    state = {key: _at_least_1d(x) for key, x in tensors.items()}
    for key, x in state.items():
        if x.numel() and (
            key not in held or held[key].size != x.shape or held[key].properties.dtype != x.dtype
        ):
            got = f"{list(held[key].size)} {held[key].properties.dtype}" if key in held else "nothing"
            raise ShardedCheckpointError(
                f"{folder / name}: {key} must be {list(x.shape)} {x.dtype}, the checkpoint has {got}"
            )
    state = {key: x for key, x in state.items() if x.numel()}
    with _in_words(f"{folder} could not be read"):
        dcp.load(state, storage_reader=reader, process_group=group.process_group, no_dist=not _started())


def as_shard(own: Tensor, sharding: Sharding) -> Tensor:
    """This rank's part `[n, ...]` as a DTensor of the whole, cut evenly (`Sharding.even`). No copy."""
    group = sharding.group
    if not _started():
        return own
    if sharding.starts != Sharding.even(group, sharding.total).starts:
        raise ValueError("as_shard: the rows must be cut evenly")
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


def _at_least_1d(x: Tensor) -> Tensor:
    return x if isinstance(x, DTensor) or x.ndim else x.view(1)


def _current(folder: Path) -> str | None:
    path = folder / CURRENT
    return path.read_text().strip() if path.exists() else None
