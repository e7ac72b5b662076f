"""`python -m attnrec.info`: what is installed, what this machine has, which backends are live or why not."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from typing import Any

import torch

import attnrec
from attnrec._extension import OPS_LIBRARY, PACKAGE, extension, reason
from attnrec.ops import OPS
from attnrec.ops.backends import BACKENDS, Backend, Call

Section = dict[str, str]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> Section:
    return {
        "attnrec": f"{attnrec.__version__} ({PACKAGE})",
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'no'})",
        "numpy": _version("numpy"),
        "triton": _version("triton"),
    }


def build() -> Section:
    """Of the compiled part `attnrec._C`."""
    if extension is None:
        return {"extension": f"none: {reason}"}
    facts = extension.build
    return {
        "extension": extension.__file__,
        "ops, for C++": str(OPS_LIBRARY),
        "compiler": facts["compiler"],
        "torch at build": facts["torch"],
        "CUDA at build": facts["cuda"] or f"no: {facts['why_no_cuda']}",
        "flags": facts["flags"],
    }


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def cpu() -> Section:
    facts = {"processor": processor(), "threads": f"{torch.get_num_threads()} (torch.set_num_threads)"}
    if extension is not None:
        try:
            tier = extension.tier_name()
        except RuntimeError as error:  # ATTNREC_CPU_TIER names one that is not there
            tier = f"none: {error}"
        facts["tier"] = f"{tier} (of {', '.join(extension.tiers_available())})"
    return facts


def gpu() -> Section:
    if not torch.cuda.is_available():
        why = "torch sees no GPU" if torch.version.cuda else "torch is a build without CUDA"
        return {"gpu": f"none: {why}"}
    found = {}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        size = device.total_memory / 2**30
        found[f"gpu {index}"] = f"{device.name}, sm_{device.major}{device.minor}, {size:.0f} GiB"
    return found


def _small_calls(device: str) -> list[Call]:
    """One call of each public op, in its native form: what a backend is asked about."""
    rows = torch.ones(2, 1, 16, device=device)
    users = torch.ones(1, 16, device=device)
    items = torch.ones(2, 16, device=device)
    offsets = torch.tensor([0, 2], device=device)
    target = torch.zeros(1, dtype=torch.int64, device=device)
    arguments: dict[str, tuple[Any, ...]] = {
        "target_attention": (rows, rows, rows, offsets, offsets),
        "target_attention_weights": (rows, rows, offsets, offsets),
        "target_attention_top": (rows, rows, offsets, offsets, 1),
        "softmax_score": (users, items, offsets),
        "catalog_topk": (users, items, 1),
        "catalog_cross_entropy": (users, items, target),
    }
    return [Call(OPS[name], OPS[name].bind(given, {})) for name, given in arguments.items()]


def state(backend: Backend, calls: Sequence[Call]) -> str:
    """In words: live, for which ops, or the reason why not."""
    served = [call.op.name for call in calls if backend.supports(call) is None]
    refused = [call for call in calls if call.op.name not in served]
    if not served:
        return f"off: {backend.supports(refused[0])}"
    if not refused:
        return "live"
    return f"live for {', '.join(served)}; not for {refused[0].op.name}: {backend.supports(refused[0])}"


def backends() -> Section:
    """Each backend's state, in the order of preference, for the device that it is made for."""
    on_gpu = torch.cuda.is_available()
    found = {}
    for backend in BACKENDS:
        device = "cuda" if on_gpu and backend.name in ("cuda", "triton") else "cpu"
        found[backend.name] = state(backend, _small_calls(device))
    return found


def probes() -> Section:
    """What this processor does at best on the tier in use; takes about a second."""
    if extension is None:
        return {"probes": f"none: {reason}"}
    threads = torch.get_num_threads()
    return {
        "fp32 multiply-add": f"{extension.probe_flops('float32', threads) / 1e9:.0f} GFLOP/s",
        "memory": f"{extension.probe_read_bandwidth(1 << 28, threads) / 1e9:.0f} GB/s read",
        "exponentials": f"{extension.probe_exp(threads) / 1e9:.1f} G/s",
    }


def collect(*, probe: bool = False) -> dict[str, Section]:
    """All of it: section → what → in words."""
    sections = {"versions": versions(), "build": build(), "cpu": cpu(), "gpu": gpu(), "backends": backends()}
    if probe:
        sections[f"probes ({torch.get_num_threads()} threads)"] = probes()
    return sections


def show(sections: dict[str, Section]) -> None:
    width = max(len(what) for section in sections.values() for what in section)
    for title, section in sections.items():
        print(title)
        for what, words in section.items():
            print(f"  {what:<{width}}  {words}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m attnrec.info", description=__doc__)
    parser.add_argument(
        "--probe", action="store_true", help="also measure what the processor does at best (1 s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    sections = collect(probe=options.probe)
    if options.json:
        print(json.dumps(sections, indent=2))
    else:
        show(sections)


if __name__ == "__main__":
    main()
