"""Catalogues as safetensors files: the tensors, and a description in JSON in the header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnrec.catalog.filters import DTYPES, LAYOUT, Filter
from attnrec.catalog.items import Items
from attnrec.files import replacing
from attnrec.ops.checks import FLOATS

KEY = "attnrec.catalog"
VERSION = 1


class CatalogFileError(ValueError):
    """A file that is no catalogue, or not one that this version reads."""


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "saving and loading a Catalog needs safetensors: pip install 'attnrec[catalog]'"
        ) from error
    return safetensors


def write(path: Path, items: Items, dtype: str) -> None:
    """The visible part of `items`; straight from its memory where rows are contiguous."""
    safetensors = _safetensors()
    description = {
        "version": VERSION,
        "dtype": dtype,
        "count": items.count,
        "dim": items.rows.shape[1],
        "layout": LAYOUT,
    }
    tensors = {name: x.contiguous() for name, x in items.visible.tensors.items()}
    with replacing(path) as partial:
        safetensors.torch.save_file(tensors, partial, metadata={KEY: json.dumps(description)})


def read(path: Path, mmap: bool) -> tuple[Items, str]:
    """Items and dtype; see `Catalog.load`."""
    safetensors = _safetensors()
    if not path.is_file():
        raise FileNotFoundError(f"no catalogue {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except safetensors.SafetensorError as error:
        raise CatalogFileError(f"{path}: damaged, or not a safetensors file ({error})") from None
    if KEY not in metadata:
        raise CatalogFileError(f"{path}: a safetensors file, but not a catalogue of attnrec")
    try:
        description = json.loads(metadata[KEY])
        version = description["version"]
    except (ValueError, TypeError, KeyError):
        raise CatalogFileError(f"{path}: no description of a catalogue: {metadata[KEY]!r}") from None
    if version != VERSION:
        raise CatalogFileError(f"{path}: version {version} of the format, this attnrec reads {VERSION}")
    # Behind an odd number of 16-bit values codes are not where four bytes of them could be read as one.
    tensors = {name: x if mmap and x.data_ptr() % 4 == 0 else x.clone() for name, x in tensors.items()}
    return _items(path, description, tensors), description["dtype"]


def _items(path: Path, description: dict[str, Any], tensors: dict[str, Tensor]) -> Items:
    dtype, count, dim = (description.get(name) for name in ("dtype", "count", "dim"))
    rows, bias = tensors.get("rows"), tensors.get("bias")
    fits = dtype in DTYPES and rows is not None and rows.dtype in FLOATS and list(rows.shape) == [count, dim]
    if fits and bias is not None:
        fits = bias.dtype in (torch.float32, rows.dtype) and list(bias.shape) == [count]
    packed = None
    if fits and dtype != "fp32":
        # None in the file where the catalogue lay on a GPU
        if description.get("layout") == LAYOUT and tensors.keys() >= Filter.NAMES:
            packed = Filter(**{name: tensors[name] for name in Filter.NAMES})
            fits = packed.fits(count, dim, dtype)
        else:
            packed = Filter.of(rows, dtype)
    if not fits:
        found = {name: list(x.shape) for name, x in tensors.items()}
        raise CatalogFileError(f"{path}: tensors of shapes {found} are not those of {description}")
    return Items(count, rows, bias, packed, owned=True)
