"""attnrec's Triton kernels, installed as `attnrec.kernels`.

A file an op, with a function of the op's name and the schema's arguments. Imports nothing of the rest of the
project, and Triton (3.6 or newer) only when a kernel is asked for. Arguments are the caller's to check.
"""

import importlib
import os
import re
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

# Op → module. A module may have a function `why_not(op, arguments)`: limits beyond the op's own, in words.
MODULES: dict[str, str] = {
    "catalog_cross_entropy": "catalog_cross_entropy",
    "catalog_cross_entropy_backward": "catalog_cross_entropy_backward",
    "catalog_topk": "catalog_topk",
    "target_attention": "target_attention",
    "target_attention_weights": "target_attention_weights",
    "target_attention_top": "target_attention_top",
    "target_attention_backward": "target_attention_backward",
    "softmax_score": "softmax_score",
    "softmax_score_backward": "softmax_score",
}

NEEDED = (3, 6)
LARGEST_DIM = 256


def kernel(op: str) -> Callable[..., Any]:
    """The function that runs an op of MODULES on tensors of a device which `why_not` does not refuse."""
    return getattr(_module(MODULES[op]), op)


def why_not(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of this device, in words, or None."""
    if device.type == "cpu" and not _cpu_tensors_allowed():
        return "CPU tensors can only be interpreted, under TRITON_INTERPRET=1"
    if device.type not in ("cpu", "cuda"):
        return f"the tensors are on {device}"
    return _why_no_triton() or (_why_not_gpu(device) if device.type == "cuda" else None)


def why_not_these(op: str, arguments: dict[str, Any]) -> str | None:
    """Why the kernel of an op of MODULES does not take these (checked) arguments, in words, or None."""
    dim = arguments.get("query", arguments.get("users")).shape[-1]
    if dim > LARGEST_DIM:
        return f"the kernels take vectors of up to {LARGEST_DIM} elements, not {dim}"
    limits = getattr(_module(MODULES[op]), "why_not", None)
    return None if limits is None else limits(op, arguments)


@cache
def _module(name: str) -> Any:
    return importlib.import_module(f".{name}", __name__)


@cache
def _why_no_triton() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"triton is not there: {error}"
    version = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
    if version < NEEDED:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, NEEDED))}"
    return None


@cache
def _why_not_gpu(device: torch.device) -> str | None:
    if torch.version.cuda is None:
        return "the kernels are written for NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"the GPU is sm_{major}{minor}, and the kernels need sm_80 or newer"


def _cpu_tensors_allowed() -> bool:
    """Interpreted, or while a stand-in for the GPU's driver is active. Imports nothing to find out."""
    launch = sys.modules.get(f"{__name__}.launch")
    return getattr(launch, "cpu_tensors_allowed", False) or os.environ.get("TRITON_INTERPRET", "0") == "1"
