"""The machine that measures: what it is, and the fastest that it can multiply, read and exponentiate."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import attnrec
from attnrec._extension import extension
from attnrec.info import processor
from benches.case import DTYPES, Counts
from benches.measure import synchronize

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "sve",
)
# What else changes speeds: shown where it is set.
ENVIRONMENT = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "ONEDNN_", "ATEN_", "ATTNREC_", "XLA_", "TORCH")

Machine = dict[str, Any]


# --- what it is ---------------------------------------------------------------------------------------------


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git(*arguments: str, root: Path = ROOT) -> str:
    """Standard output of git, or "" where there is no repository."""
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def cpu_flags() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    lines = [
        line.partition(":")[2].split() for line in text.splitlines() if line.startswith(("flags", "Features"))
    ]
    return [flag for flag in FLAGS if lines and flag in lines[0]]


def describe(threads: int, device: torch.device, packages: Sequence[str] = ()) -> Machine:
    """The machine line, as a dictionary. `packages`: of peers, whose versions count too."""
    machine: Machine = {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": cpu_flags(),
        "tier": extension.tier_name() if extension is not None else None,
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "attnrec": attnrec.__version__,
        "commit": git("rev-parse", "--short=10", "HEAD") or None,
        "dirty": bool(
            git(
                "status", "--porcelain", "--untracked-files=no", "--", "attnrec", "csrc", "kernels", "benches"
            )
        ),
        "device": device.type,
        "packages": {name: found for name in packages if (found := version(name)) is not None},
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(ENVIRONMENT)},
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
        machine["driver"] = nvidia_smi("driver_version")
    return machine


def nvidia_smi(what: str) -> str | None:
    """The first GPU's answer to a query, or None where there is no tool to ask."""
    try:
        found = subprocess.run(
            ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.splitlines()[0].strip()


def line(machine: Machine) -> str:
    """The machine in one line of text."""
    parts = [
        f"{machine['cpu']} ({machine['cores']} cores; {' '.join(machine['flags'])})",
        f"tier {machine['tier']}",
        f"{machine['threads']} threads",
        f"torch {machine['torch']}",
        f"triton {machine['triton'] or '–'}",
    ]
    if machine["device"] == "cuda":
        parts.append(f"{machine['gpu']}, driver {machine['driver']}")
    parts.append(f"commit {machine['commit'] or '–'}{' (dirty)' if machine['dirty'] else ''}")
    parts += [f"{name}={value}" for name, value in machine["environment"].items()]
    return " · ".join(parts)


# --- what it can do -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Floors:
    """The machine's own limits, measured.

    Attributes:
        flops: per dtype, operations per second of matrix products.
        bandwidth: (bytes, bytes per second) of reading a buffer of that size, the sizes rising: small data
            sit in a cache, and the memory's rate would not be their floor.
        exps: exponentials per second.
    """

    flops: dict[str, float]
    bandwidth: list[tuple[int, float]]
    exps: float

    def better(self, other: Floors) -> Floors:
        """The higher of each rate of two measurements of one machine."""
        return Floors(
            {dtype: max(rate, other.flops[dtype]) for dtype, rate in self.flops.items()},
            [
                (size, max(rate, again))
                for (size, rate), (_, again) in zip(self.bandwidth, other.bandwidth, strict=True)
            ],
            max(self.exps, other.exps),
        )

    def seconds(self, counts: Counts, dtype: str) -> tuple[float, str]:
        """The least time for this work, and which limit it is."""
        limits = {
            "matrix": counts.flops / self.flops[dtype],
            "memory": counts.bytes / self.read_rate(counts.bytes),
            "exponentials": counts.exps / self.exps,
        }
        bound = max(limits, key=lambda name: limits[name])
        return limits[bound], bound

    def read_rate(self, size: float) -> float:
        """Bytes a second, between two measured sizes by their logarithms: a cache ends gradually."""
        for (low, fast), (high, slow) in pairwise(self.bandwidth):
            if low <= size <= high:
                part = math.log(size / low) / math.log(high / low)
                return fast ** (1 - part) * slow**part
        return self.bandwidth[0 if size < self.bandwidth[0][0] else -1][1]

    def to_json(self) -> dict[str, Any]:
        return {"flops": self.flops, "bandwidth": [list(pair) for pair in self.bandwidth], "exps": self.exps}


SIZES = tuple(1 << n for n in range(18, 29))
# On a GPU: exponentials a clock and SM of the special-function unit (sm_80 to sm_100).
SPECIAL_FUNCTIONS_PER_CLOCK = 16


def measure_floors(
    threads: int, device: torch.device, dtypes: Sequence[str], *, seconds: float = 0.2
) -> Floors:
    """Measures all of them; about two seconds on a CPU. The dtypes' rate is the best of what was tried.

    Matrix rate: torch's own product of square matrices, and on a CPU the tier's multiply-adds out of
    registers where that is more.
    """
    flops = {dtype: matrix_rate(DTYPES[dtype], device, seconds) for dtype in dtypes}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        clock = float(nvidia_smi("clocks.max.sm") or 1000) * 1e6
        copied = best_rate(
            lambda: _buffer(1 << 30, device), lambda x: x.clone(), 2 * (1 << 30), device, seconds
        )
        exps = SPECIAL_FUNCTIONS_PER_CLOCK * properties.multi_processor_count * clock
        return Floors(flops, [(1 << 30, copied)], exps)
    if extension is None:
        bandwidth = [
            (
                size,
                best_rate(lambda size=size: _buffer(size, device), lambda x: x.sum(), size, device, seconds),
            )
            for size in SIZES
        ]
        exps = best_rate(lambda: _buffer(1 << 18, device), lambda x: x.exp(), 1 << 16, device, seconds)
        return Floors(flops, bandwidth, exps)
    bandwidth = [(size, extension.probe_read_bandwidth(size, threads)) for size in SIZES]
    multiply_adds = extension.probe_flops("float32", threads)
    flops = {dtype: max(rate, multiply_adds) for dtype, rate in flops.items()}
    return Floors(flops, bandwidth, extension.probe_exp(threads))


def _buffer(size: int, device: torch.device) -> torch.Tensor:
    return torch.ones(size // 4, device=device)


def matrix_rate(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    n = 8192 if device.type == "cuda" else 1024
    return best_rate(
        lambda: torch.ones(n, n, dtype=dtype, device=device), lambda x: x @ x, 2.0 * n**3, device, seconds
    )


def best_rate(
    make: Callable[[], torch.Tensor],
    work: Callable[[torch.Tensor], Any],
    units: float,
    device: torch.device,
    seconds: float,
) -> float:
    """Units a second of the quickest of the calls that fit into `seconds`, at least three after the first."""
    data = make()
    work(data)
    synchronize(device)
    best, start, calls = float("inf"), time.perf_counter(), 0
    while calls < 3 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        work(data)
        synchronize(device)
        best = min(best, time.perf_counter() - before)
        calls += 1
    return units / best
