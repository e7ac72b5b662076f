"""Peers that can be compiled without a GPU, for the performance model: each package's own launch code runs on
small CPU tensors under the stand-in driver, with the tiles that it chooses for the chip.

Only what is installed takes part (`pip install -e .[bench]`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from attnrec.kernels.standin import Launched, stand_in

ROWS, EVENTS, HEADS = 256, 256, 2


@dataclass(frozen=True)
class Peer:
    """`run(arch, dtype, head_dim)` launches its kernels; `kernels` are those to look at, by function name:
    the table entry that it is a peer of, FLOP of a score and head dim, names of the constants that hold its
    tile. `stationary`: those whose blocks hold events. `parts`: those whose blocks may add up a part of the
    values only, and the constants that hold how many dims there are and how many a block has."""

    name: str
    package: str
    run: Callable[[int, torch.dtype, int], None]
    kernels: dict[str, tuple[str, int, str, str]]
    stationary: dict[str, str]
    parts: dict[str, tuple[str, str]]

    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None

    def launches(self, arch: int, dtype: torch.dtype, head_dim: int) -> Iterator[Launched]:
        """What it launches and the model looks at."""
        found: list[Launched] = []
        with stand_in(arch, found.append), _a_gpu_of(arch):
            self.run(arch, dtype, head_dim)
        yield from (launched for launched in found if launched.name in self.kernels)


@contextmanager
def _a_gpu_of(arch: int) -> Iterator[None]:
    """torch answers as if there were one: the packages choose tiles by it."""
    name = {80: "NVIDIA A100", 90: "NVIDIA H100"}.get(arch, "")
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=divmod(arch, 10)),
        mock.patch.object(torch.cuda, "get_device_name", return_value=name),
    ):
        yield


def _flash_linear_attention(arch: int, dtype: torch.dtype, head_dim: int) -> None:
    from fla.ops.attn import parallel

    def check_shared_mem(name: str = "none", device: int = 0) -> bool:
        return arch >= {"hopper": 90, "ampere": 80}.get(name, 80)

    q, k, v = (torch.zeros(1, ROWS, HEADS, head_dim, dtype=dtype) for _ in range(3))
    with mock.patch.object(parallel, "check_shared_mem", check_shared_mem):
        out, lse = parallel.parallel_attn_fwd(q, k, v, None, None, 0.1)
        if head_dim <= 128:  # its backward holds no larger head
            parallel.parallel_attn_bwd(q, k, v, out, None, lse, torch.zeros_like(out), scale=0.1)


FLASH_LINEAR_ATTENTION = Peer(
    "flash-linear-attention parallel_attn",
    "fla",
    _flash_linear_attention,
    {
        "parallel_attn_fwd_kernel": ("target_attention", 4, "BT", "BS"),
        "parallel_attn_bwd_kernel_dq": ("target_attention_backward_rows", 6, "BT", "BS"),
        "parallel_attn_bwd_kernel_dkv": ("target_attention_backward_events", 8, "BS", "BT"),
    },
    {"parallel_attn_bwd_kernel_dkv": "events"},
    {"parallel_attn_fwd_kernel": ("V", "BV")},
)
PEERS = (FLASH_LINEAR_ATTENTION,)
