"""The tensors of a catalogue, with room for more items."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from attnrec.catalog.filters import Filter, Places, put, roomy


@dataclass(frozen=True)
class Items:
    """The first `count` places of every tensor are the items; the rest is room.

    A search takes one such object and reads its visible part. A change of how many items there are, or of
    where they lie, makes another object; what is visible is written in place, while nobody searches.
    """

    count: int
    rows: Tensor  # [capacity, D]
    bias: Tensor | None  # [capacity]
    filter: Filter | None  # with the same room
    owned: bool  # nobody else has these tensors: they may be written

    @property
    def capacity(self) -> int:
        return self.rows.shape[0]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of them, by the names that they have in files."""
        bias = {} if self.bias is None else {"bias": self.bias}
        return {"rows": self.rows} | bias | (self.filter.tensors if self.filter else {})

    @cached_property
    def visible(self) -> Items:
        """Without the room: views."""
        return Items(
            self.count,
            self.rows[: self.count],
            None if self.bias is None else self.bias[: self.count],
            self.filter.first(self.count) if self.filter else None,
            self.owned,
        )

    def copied(self, capacity: int, *, with_filter: bool = False) -> Items:
        """The same items in memory of their own, with so much room.

        A filter that need not grow, which was our own from the start, is shared with the copy, unless asked
        for otherwise: then nothing is, and the copy may be written at once.
        """
        seen = self.visible
        with_filter = self.filter is not None and (with_filter or capacity > self.capacity)
        return Items(
            self.count,
            roomy(seen.rows, capacity),
            None if seen.bias is None else roomy(seen.bias, capacity),
            self.filter.copied(self.count, capacity) if with_filter else self.filter,
            owned=True,
        )

    def longer(self, count: int) -> Items:
        """With so many items visible."""
        if self.filter is not None:
            self.filter.clear_behind(count)
        return replace(self, count=count)

    def write(self, at: Places, rows: Tensor | None, bias: Tensor | None, filter: Filter | None) -> None:
        """Puts what is given of rows, biases and the rows' filter at these places.

        Interrupted between two of them, it leaves a filter that lets these items through.
        """
        if filter is not None and self.filter is not None:
            self.filter.open(at)
        if rows is not None:
            put(self.rows, at, rows)
        if bias is not None and self.bias is not None:
            put(self.bias, at, bias.to(self.bias.dtype))
        if filter is not None and self.filter is not None:
            self.filter.write(at, filter)
