"""Launch parameters: which tile, how many warps and pipeline stages a kernel is launched with.

They come from a table per architecture, `tables/sm_<arch>.json`, and are a pure function of what is
static: the kernel, the head dim, the dtype, the options that change the code, and the architecture. The
width of a tile, and how warps share it, never depend on a batch's sizes: they decide the order of a row's
sums, and a row's result must be the same bits in every batch. Its height may (`one_chunk`, `few_rows`).
Nothing is measured in a user's process; a table is rewritten by `python -m attnrec.kernels.tune`.

A table holds, for each kernel, a list of entries; the first one that fits is taken:

    {"dtype": "half", "head_dim": [16, 32], "launch": [64, 64, 4, 3], "why": "model: ..."}

`dtype` is "half" (fp16 and bf16) or "float32", `head_dim` the native head dims that it is for, `launch`
(block_m, block_n, num_warps, num_stages), `why` the reason. Any other key is a trait that the caller has to
pass with this value; traits that an entry does not name do not matter to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from triton import knobs
from triton.runtime import driver

NATIVE_HEAD_DIMS = (16, 32, 64, 128, 256)
REGISTERS = 65536  # of an SM, and the most of a block, on all architectures
FEW_ROWS = 64
SIZES = {"one_chunk", "few_rows"}  # traits of a batch's sizes, which are not options
_INTERPRETED = knobs.runtime.interpret  # once: the environment is read each time
TABLES = Path(__file__).parent / "tables"

# Set while a stand-in driver (the ahead-of-time compiler's, an emulator's) takes launches on CPU tensors.
cpu_tensors_allowed = False


class Launch(NamedTuple):
    """`block_m` rows and `block_n` columns of a tile, Triton's own two parameters, and the most registers of
    a thread (None: as many as ptxas likes), which `target_attention` heeds in half precision, and the pass
    along rows of its gradient."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    registers: int | None = None


def arch() -> int:
    """Compute capability of the current device as 10 * major + minor; 80 under Triton's interpreter."""
    if _INTERPRETED:
        return 80
    active = driver.active
    return _arch_of(type(active), active.get_current_device())


@cache
def _arch_of(kind: type, device: int) -> int:
    """Kept, because a driver takes microseconds to say it: that of the current device, which `device` is."""
    return driver.active.get_current_target().arch


def most_registers(num_warps: int) -> int:
    """What a thread can have, for `maxnreg`: without it ptxas stops at some number below, for the sake of
    resident blocks, and spills a few registers instead."""
    return min(255, REGISTERS // (32 * num_warps))


def few_rows(rows: int, users: int) -> bool:
    """The trait of a batch whose users have at most FEW_ROWS rows on average, of each key/value head."""
    return rows <= FEW_ROWS * users


def native_head_dim(head_dim: int) -> int:
    """The power of two, at least 16, in which a kernel holds a head of this dim."""
    return max(16, next_power_of_2(head_dim))


def cdiv(a: int, b: int) -> int:
    """`a / b`, rounded up. Triton's own, like its next power of 2, is made for kernels and takes 2 us."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least that is not below `n`, which is at least 1."""
    return 1 << (n - 1).bit_length()


def parameters(
    kernel: str, *, head_dim: int, dtype: torch.dtype, arch: int | None = None, **traits: bool | int | str
) -> Launch:
    """The table's launch parameters for `kernel`.

    `arch` is the current device's unless given; one without a table takes the nearest lower one's. Raises
    `LookupError` where the table has no entry that fits.
    """
    if kernel in _forced:
        return _forced[kernel]
    arch = current_arch() if arch is None else arch
    return _find(kernel, head_dim, dtype, arch, tuple(traits.items()))


@contextmanager
def forced(kernel: str, launch: Launch) -> Iterator[None]:
    """`parameters` answers this for `kernel`, whatever the table says: to try it out."""
    _forced[kernel] = launch
    try:
        yield
    finally:
        del _forced[kernel]


_forced: dict[str, Launch] = {}
current_arch = arch  # `arch` is also the name of a parameter


def table(arch: int) -> dict[str, list[dict]]:
    """The entries of each kernel for an architecture."""
    return _read(table_path(arch))


def table_path(arch: int) -> Path:
    """The file of the nearest architecture at or below `arch` that has one."""
    at_or_below = [known for known in tables() if known <= arch]
    if not at_or_below:
        raise LookupError(f"no launch table for sm_{arch}: the kernels need at least sm_{tables()[0]}")
    return TABLES / f"sm_{at_or_below[-1]}.json"


@cache
def tables() -> list[int]:
    """The architectures that have a table, in rising order."""
    return sorted(int(path.stem.removeprefix("sm_")) for path in TABLES.glob("sm_*.json"))


def fits(entry: dict, head_dim: int, dtype: torch.dtype, traits: dict) -> bool:
    """Whether an entry of the table is for this call."""
    return (
        entry["dtype"] == ("float32" if dtype == torch.float32 else "half")
        and native_head_dim(head_dim) in entry["head_dim"]
        and all(traits.get(name) == wanted for name, wanted in entry.items() if name not in _COMMON)
    )


_COMMON = ("dtype", "head_dim", "launch", "why")


@cache
def _read(path: Path) -> dict[str, list[dict]]:
    return json.loads(path.read_text())


@cache
def _find(kernel: str, head_dim: int, dtype: torch.dtype, arch: int, traits: tuple) -> Launch:
    kernels = table(arch)
    if kernel not in kernels:
        raise LookupError(f"{table_path(arch).name} has no kernel {kernel!r}; it has {', '.join(kernels)}")
    for entry in kernels[kernel]:
        if fits(entry, head_dim, dtype, dict(traits)):
            return Launch(*entry["launch"])
    raise LookupError(
        f"{table_path(arch).name} has no entry for {kernel} with head dim {head_dim}, {dtype}, {dict(traits)}"
    )
