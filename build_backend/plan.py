"""What the build does with the machine it finds: pure functions of their arguments, for tests to call."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

# One binary for every torch from 2.11 on: the stable ABI's functions of that version and no newer ones.
TORCH_TARGET = "0x020b000000000000"
TORCH_OLDEST, TORCH_NEWEST = (2, 11), (2, 14)
# With no arch list set and no GPU in the machine torch's helper guesses or raises; so the list is ours. Code
# for 8.0 runs on 8.6 and 8.9 too, that for 10.0 on 10.3; a chip that is not named compiles 8.0's PTX at load.
CUDA_ARCHS = "8.0+PTX;9.0a;10.0;12.0"
# A translation unit of kernel templates at -O3 needs up to about 1.5 GB.
GIB_PER_JOB = 2.0

# The languages' versions are named, since torch's helper adds one of its own otherwise: C++17 before 2.12.
# No -march: what needs more than the baseline sits in the tier files and is chosen at run time. No
# contraction: a*b+c is fused where a kernel says so and nowhere else, so that every compiler gives the same
# bits. These come after Python's own flags, which ask for -O2 or debug information on some systems.
CXX_FLAGS = (
    "-std=c++20",
    "-O3",
    "-g0",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",  # vectors wider than SSE's are passed between inlined functions only
)
SANITIZE_FLAGS = (
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
)

# For tests: the AMX tier over a stand-in for its tile instructions, where the processor has none.
EMULATE_AMX_FLAG = "-DATTNREC_AMX_EMULATED"


class BuildError(RuntimeError):
    """The build was asked for something that this machine or this source tree cannot give."""


@dataclass(frozen=True)
class Plan:
    """Sources and flags of `attnrec._C`; paths are relative to the source tree."""

    sources: list[str]
    depends: list[str]
    cxx_flags: list[str]
    nvcc_flags: list[str]
    link_flags: list[str]
    cuda: str | None  # torch's CUDA version where CUDA sources are compiled
    why_no_cuda: str  # empty where they are
    environment: dict[str, str] = field(default_factory=dict)  # to set before torch's helper looks


def supported(version: str) -> bool:
    """Whether a torch of this version ("2.13.0+cpu") is one that attnrec builds against and runs under."""
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        return False
    return TORCH_OLDEST <= (major, minor) <= TORCH_NEWEST


def cuda_home(environ: Mapping[str, str], nvcc: str | None) -> str | None:
    """The toolkit's folder: CUDA_HOME, else where `nvcc` really lies.

    Links are followed first: an nvcc linked into /usr/local/bin would give /usr/local, which has no headers.
    Where it is a script that runs another one, that one is asked.
    """
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(name):
            return environ[name]
    if not nvcc:
        return None
    home = Path(os.path.realpath(nvcc)).parent.parent
    if not (home / "include" / "cuda_runtime_api.h").exists():
        home = _home_that_it_names(nvcc) or home
    return str(home)


def _home_that_it_names(nvcc: str) -> Path | None:
    try:
        said = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, timeout=60).stderr
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return Path(os.path.realpath(found[1].strip())) if found else None


def decide_cuda(wanted: str, torch_cuda: str | None, home: str | None, sources: list[str]) -> str:
    """Why no CUDA sources are compiled, "" where they are; `wanted` is ATTNREC_CUDA: off, auto or require.

    Whether a GPU is in the machine plays no part: wheels are built where there is none.
    """
    if wanted not in ("off", "auto", "require"):
        raise BuildError(f"ATTNREC_CUDA is {wanted!r}; it must be off, auto or require")
    if wanted == "off":
        return "ATTNREC_CUDA=off"
    reason = ""
    if not sources:
        reason = "this version of attnrec has no CUDA sources"
    elif torch_cuda is None:
        reason = "the installed torch is a build without CUDA"
    elif home is None:
        reason = "no CUDA toolkit was found (CUDA_HOME is not set and there is no nvcc on PATH)"
    if reason and wanted == "require":
        raise BuildError(f"ATTNREC_CUDA=require, but {reason}")
    return reason


def max_jobs(cores: int, memory_gib: float | None) -> int:
    """How many compilers to run at once: as many as cores, and no more than memory holds."""
    by_memory = cores if memory_gib is None else int(memory_gib / GIB_PER_JOB)
    return max(1, min(cores, by_memory))


def available_memory_gib(meminfo: str = "/proc/meminfo") -> float | None:
    """Memory that is free to use, in GiB; None where the system does not say."""
    try:
        with open(meminfo) as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) / 2**20
    except OSError:
        pass
    return None


def make_plan(
    root: Path,
    environ: Mapping[str, str],
    *,
    torch_cuda: str | None = None,
    nvcc: str | None = None,
    cores: int = 1,
    memory_gib: float | None = None,
) -> Plan:
    """The whole decision. Raises `BuildError` where ATTNREC_CUDA=require cannot be met."""

    def find(*patterns: str) -> list[str]:
        return sorted(str(p.relative_to(root)) for pattern in patterns for p in root.glob(pattern))

    cuda_sources = find("csrc/cuda/**/*.cu", "csrc/cuda/**/*.cpp")
    home = cuda_home(environ, nvcc)
    why_no_cuda = decide_cuda(environ.get("ATTNREC_CUDA", "auto"), torch_cuda, home, cuda_sources)
    sanitize = environ.get("ATTNREC_SANITIZE", "0") == "1"
    amx = environ.get("ATTNREC_AMX", "native")
    if amx not in ("native", "emulated"):
        raise BuildError(f"ATTNREC_AMX is {amx!r}; it must be native or emulated")
    target = f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"
    settings = {}
    if "MAX_JOBS" not in environ:
        settings["MAX_JOBS"] = str(max_jobs(cores, memory_gib))
    if not why_no_cuda:
        settings["CUDA_HOME"] = str(home)
        if not environ.get("TORCH_CUDA_ARCH_LIST"):
            settings["TORCH_CUDA_ARCH_LIST"] = CUDA_ARCHS
    return Plan(
        sources=find("csrc/*.cpp", "csrc/cpu/**/*.cpp") + ([] if why_no_cuda else cuda_sources),
        depends=find("csrc/**/*.h", "csrc/**/*.cuh"),
        cxx_flags=[
            *CXX_FLAGS,
            *(SANITIZE_FLAGS if sanitize else ()),
            *((EMULATE_AMX_FLAG,) if amx == "emulated" else ()),
            target,
        ],
        nvcc_flags=["-std=c++17", "-O3", target],
        link_flags=["-fsanitize=address,undefined"] if sanitize else [],
        cuda=None if why_no_cuda else torch_cuda,
        why_no_cuda=why_no_cuda,
        environment=settings,
    )
