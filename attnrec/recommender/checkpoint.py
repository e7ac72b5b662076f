"""Checkpoints: one safetensors file each, tensors and a JSON description in its header. No pickles.

A file is written beside its place and renamed into it, so that a failed or killed write leaves the old one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from attnrec.files import write_file

KEY = "attnrec"
Tensors = dict[str, Tensor]


class CheckpointError(RuntimeError):
    """A file that is no checkpoint, or not one of this model."""


def save_checkpoint(path: Path, tensors: Tensors, description: dict[str, Any]) -> None:
    """Writes tensors and a description that JSON can hold."""
    # one memory under two names (tied weights) is refused by safetensors: each gets its own copy
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    write_file(path, save(tensors, metadata={KEY: json.dumps(description)}))


def load_checkpoint(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and description.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: the file is damaged or was not written by `save_checkpoint`.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if KEY not in metadata:
        raise CheckpointError(f"{path}: a safetensors file, but not a checkpoint of attnrec.recommender")
    return tensors, json.loads(metadata[KEY])


def load_weights(path: Path, module: nn.Module, tensors: Tensors) -> None:
    """Puts the tensors of a checkpoint into a module; CheckpointError where they do not fit."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: {error}") from None


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def part(prefix: str, tensors: Tensors) -> Tensors:
    """The tensors below a prefix, without it."""
    prefix += "."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimizer's state by parameter number; its settings come from the configuration."""
    return {
        f"{number}.{name}": value
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    state: dict[int, Tensors] = {}
    for name, tensor in tensors.items():
        number, _, entry = name.partition(".")
        state.setdefault(int(number), {})[entry] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
