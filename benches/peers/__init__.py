"""The others: a file for each engine. Each prepares a contender, or raises Refused with the reason."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from benches.case import Refused

# Module → the name under which it is installed. A peer that is not there is listed and left out.
PACKAGES = {
    "openvino": "openvino",
    "onnxruntime": "onnxruntime",
    "onnx": "onnx",
    "faiss": "faiss-cpu",
    "scann": "scann",
    "jax": "jax",
    "flash_attn": "flash-attn",
    "xformers": "xformers",
    "liger_kernel": "liger-kernel",
    "cut_cross_entropy": "cut-cross-entropy",
}


def need(module: str) -> ModuleType:
    """The module, imported, or Refused."""
    package = PACKAGES[module.partition(".")[0]]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise Refused(f"{package} is not installed") from None
    except Exception as error:  # a broken install must not end the run
        raise Refused(f"{package} does not import: {error}") from error


def need_device(device: torch.device, kind: str) -> None:
    if device.type != kind:
        raise Refused(f"runs on {kind} only")
