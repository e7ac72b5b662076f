"""Reader of RecBole's atomic files: tab-separated text whose header names each column and its type.

    user_id:token	rating:float	genres:token_seq	embedding:float_seq

A `token` is a word, a `token_seq` words separated by spaces; `float` and `float_seq` likewise in numbers.
An empty field is a missing value: the empty word, NaN, or an empty sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

Column = list[Any]  # one value a row: str, float, list[str] or list[float]


class DataSetError(ValueError):
    """Files that cannot be read as a data set."""


class AtomicFileError(DataSetError):
    """A malformed atomic file; the message starts with `file:line:`."""

    def __init__(self, path: Path, line: int, message: str) -> None:
        super().__init__(f"{path}:{line}: {message}")


def _number(text: str) -> float:
    return _finite(text) if text else math.nan


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError
    return number


PARSERS: dict[str, Callable[[str], Any]] = {
    "token": str,
    "token_seq": str.split,
    "float": _number,
    "float_seq": lambda text: [_finite(part) for part in text.split()],
}


def read_atomic(path: str | Path) -> dict[str, Column]:
    """The columns of an atomic file, by name and in the file's order.

    Raises:
        FileNotFoundError: there is no such file.
        AtomicFileError: a header without known types or with a repeated name, a row with another number of
            fields than the header, an empty line before the last row, a number that is none, or text that is
            not UTF-8.
    """
    path = Path(path)
    with path.open("rb") as file:
        names, kinds = _header(path, _text(path, 1, file.readline()))
        columns: dict[str, Column] = {name: [] for name in names}
        targets = [
            (name, kind, PARSERS[kind], columns[name].append) for name, kind in zip(names, kinds, strict=True)
        ]
        blank = 0
        for line, raw in enumerate(file, start=2):
            text = _text(path, line, raw)
            if not text:
                blank = blank or line
                continue
            if blank:  # allowed at the end only, so that row n stands in line n + 2
                raise AtomicFileError(path, blank, "an empty line")
            fields = text.split("\t")
            if len(fields) != len(names):
                raise AtomicFileError(path, line, f"{len(fields)} fields, the header has {len(names)}")
            for (name, kind, parse, append), field in zip(targets, fields, strict=True):
                try:
                    append(parse(field))
                except ValueError:
                    raise AtomicFileError(path, line, f"column {name} ({kind}): got {field!r}") from None
    return columns


def _text(path: Path, line: int, raw: bytes) -> str:
    try:
        return raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        raise AtomicFileError(path, line, "the text is not UTF-8") from None


def _header(path: Path, text: str) -> tuple[list[str], list[str]]:
    names, kinds = [], []
    for field in text.split("\t"):
        name, _, kind = field.rpartition(":")
        if not name or kind not in PARSERS:
            raise AtomicFileError(
                path, 1, f"header field {field!r}: want name:type, type {', '.join(PARSERS)}"
            )
        if name in names:
            raise AtomicFileError(path, 1, f"column {name} is there twice")
        names.append(name)
        kinds.append(kind)
    return names, kinds
