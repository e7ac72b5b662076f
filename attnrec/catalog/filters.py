"""The filter in front of a catalogue's rows: codes of bf16 or int8, and by how much they may be wrong.

The op `catalog_filter` makes it. Item i stands in panel i // PANEL at place i % PANEL, and nothing in a panel
depends on the other items: single items are written in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnrec import ops
from attnrec.reference import FILTER_CODES, catalog_filter
from attnrec.reference import FILTER_PANEL as PANEL

Places = Tensor | slice  # different ids, or all from the slice's start to its stop
DTYPES = ("fp32", *FILTER_CODES)  # "fp32": no filter
LAYOUT = "panels of 32 items, version 1"  # for files: with another one a filter is made anew


@dataclass(frozen=True)
class Filter:
    codes: Tensor  # [panels, D / 2 (bf16) or D / 4 (int8), PANEL, 2 or 4]
    scale: Tensor  # float32 [N], int8 only, else [0]
    error: Tensor  # bfloat16 [N, 2]

    NAMES: ClassVar[frozenset[str]] = frozenset({"codes", "scale", "error"})

    @classmethod
    def of(cls, rows: Tensor, dtype: str) -> Filter | None:
        """The filter of some rows; None where there is none: for "fp32", and on devices other than the CPU,
        whose kernels read the rows."""
        if dtype == "fp32" or rows.device.type != "cpu":
            return None
        # A forced backend may have no such kernel. The filter is made all the same: the call that it was
        # forced for may be the last, and a filter of old rows would hide new ones.
        served = ops.explain("catalog_filter", rows, dtype).backend is not None
        return cls(*(ops.call("catalog_filter", rows, dtype) if served else catalog_filter(rows, dtype)))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By the names that they have in files."""
        return {name: getattr(self, name) for name in self.NAMES}

    @property
    def arguments(self) -> dict[str, Tensor]:
        """Of the op `catalog_topk`."""
        return {"filter": self.codes, "filter_scale": self.scale, "filter_error": self.error}

    def fits(self, count: int, dim: int, dtype: str) -> bool:
        """Whether these can be the tensors of so many items."""
        kind, together = FILTER_CODES[dtype]
        shapes = {
            "codes": (kind, [_panels(count), -(-dim // together), PANEL, together]),
            "scale": (torch.float32, [count if dtype == "int8" else 0]),
            "error": (torch.bfloat16, [count, 2]),
        }
        return all((x.dtype, list(x.shape)) == shapes[name] for name, x in self.tensors.items())

    def first(self, count: int) -> Filter:
        """That of the first items: views."""
        return Filter(self.codes[: _panels(count)], self.scale[:count], self.error[:count])

    def copied(self, count: int, capacity: int) -> Filter:
        """That of the first items in memory of its own, with so much room."""
        seen = self.first(count)
        scaled = self.codes.dtype == torch.uint8
        return Filter(
            roomy(seen.codes, _panels(capacity)),
            roomy(seen.scale, capacity if scaled else 0),
            roomy(seen.error, capacity),
        )

    def open(self, at: Places) -> None:
        """Rules out none of these items, whatever stands in the codes."""
        if isinstance(at, Tensor):
            self.error.index_fill_(0, at, torch.inf)
        else:
            self.error[at] = torch.inf

    def write(self, at: Places, other: Filter) -> None:
        """Puts the items of another filter at these places."""
        source = torch.arange(len(other.error), device=other.error.device)
        ids = at if isinstance(at, Tensor) else source + at.start
        # The two or four codes that stand together are four bytes: one number (10,000 items in 1 ms, not 6).
        # Indices on both sides of a slice: the indexed dimension comes first in both.
        codes, others = self.codes.view(torch.int32), other.codes.view(torch.int32)
        codes[ids // PANEL, :, ids % PANEL] = others[source // PANEL, :, source % PANEL]
        if self.codes.dtype == torch.uint8:
            put(self.scale, at, other.scale)
        put(self.error, at, other.error)

    def clear_behind(self, count: int) -> None:
        """Puts codes of 0 behind so many items in their last panel, as the packer does: what memory held
        before would be read by nobody, but stand in files."""
        if count % PANEL:
            zero = 128 if self.codes.dtype == torch.uint8 else 0
            self.codes[count // PANEL, :, count % PANEL :] = zero


def _panels(count: int) -> int:
    return -(-count // PANEL)


def put(x: Tensor, at: Places, values: Tensor) -> None:
    """Writes rows of `x`, none of them twice."""
    if isinstance(at, slice):
        x[at] = values
    else:
        x.index_copy_(0, at, values)


def roomy(x: Tensor, size: int) -> Tensor:
    """A copy with room for so many in the first dimension."""
    out = x.new_empty((size, *x.shape[1:]))
    out[: len(x)] = x
    return out
