"""`Catalog`: a table of items that is searched while it changes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from attnrec.catalog import file
from attnrec.catalog.filters import DTYPES, Filter
from attnrec.catalog.guard import Guard
from attnrec.catalog.items import Items
from attnrec.catalog.search import Answer, Exclude, search
from attnrec.ops.checks import INTEGERS, Check

# An update of a quarter of the items goes to new memory. Of a million items of 64 dims, with an int8 filter,
# writing a quarter in place took 0.04 s, for which searches wait, and copying all of them 0.17 s.
BULK = 4


class Catalog:
    """The items of a catalogue, prepared for `catalog_topk`, changed while it serves, saved and loaded.

        catalog = attnrec.Catalog.pack(table, dtype="int8")
        scores, ids, lse = catalog.topk(users, k=100)
        catalog.update(ids=[3, 14], rows=new_rows)

    Made by `Catalog.pack` and `Catalog.load`. An item's id is its row's number. All methods may be called
    from any number of threads: a search sees the catalogue as it was between two changes, all of an update or
    nothing of it. An update waits for the searches that are running (on a GPU: for the device), and searches
    that come meanwhile wait for it; preparing it, and appending, hold up nobody.

    Not pickled and not copied by `copy.deepcopy` (TypeError): processes share one by `save` and `load`.
    """

    def __init__(self, items: Items, dtype: str) -> None:
        self._items = items
        self._dtype = dtype
        self._guard = Guard()

    @classmethod
    def pack(
        cls, table: Tensor, dtype: Literal["fp32", "bf16", "int8"] = "fp32", *, bias: Tensor | None = None
    ) -> Catalog:
        """A catalogue over the rows of a table.

        Args:
            table: `[N, D]`, float32, bfloat16, float16 or float64, any strides. Referred to, not copied, and
                never written: the first `update` or `append` copies it. Rows that are changed behind the
                catalogue's back until then are read as they are by "fp32"; in front of the others stands a
                filter of the old rows, which may then lose items: tell them by `update`.
            dtype: of the filter that a search reads first. "bf16" takes half the bytes of a float32 table,
                "int8" a quarter, in addition to the table's; "fp32" is no filter. What the filter lets
                through is scored from the rows: ids and scores are those of the table whichever dtype it is.
                Where no kernel reads a filter (on a GPU, or with `use_backend`), it is left out or ignored.
            bias: `[N]`, float32 or the table's dtype, added to the logits of every search, as in
                `catalog_topk`. Held like the table.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        check = Check("Catalog.pack", ("table", table))
        check.vectors("table", table, "[N, D]")
        if dtype not in DTYPES:
            check.fail("dtype", f"be one of {', '.join(DTYPES)}", repr(dtype))
        count = table.shape[0]
        if bias is not None:
            check.tensor("bias", bias, "[N]", (count,), (torch.float32, table.dtype))
            bias = bias.detach()
        with _plain():
            packed = Filter.of(table.detach(), dtype)
        return cls(Items(count, table.detach(), bias, packed, owned=False), dtype)

    def topk(
        self,
        users: Tensor,
        k: int,
        *,
        exclude: Exclude | None = None,
        bias: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Answer:
        """The k best items for each user: `attnrec.catalog_topk`, which says what the arguments mean.

        `bias [N]` stands in place of the catalogue's own for this call.

        Returns:
            `(scores [B, k], ids [B, k], lse [B])`; with a filter `lse` is within 0.1, all else exact.
        """
        with self._guard.searching():
            items = self._items.visible
            return search(
                users,
                items.rows,
                k,
                exclude=exclude,
                bias=items.bias if bias is None else bias,
                temperature=temperature,
                packed=items.filter,
            )

    def update(
        self, ids: Tensor | Sequence[int], rows: Tensor | None = None, *, bias: Tensor | None = None
    ) -> None:
        """Replaces the rows of some items, their biases, or both.

        Args:
            ids: int32 or int64 `[m]`, or a sequence of integers. Where an id is repeated, its last row holds.
            rows: `[m, D]`, the dtype and device of the table; None leaves them.
            bias: `[m]`, where the catalogue has biases; None leaves them. -inf hides an item.

        O(m · D) time and memory, and searches wait while m rows are written. Where these are N / 4 or more,
        and in the first change of a catalogue that was packed (not loaded), everything is copied to new
        memory: searches that run go on in the old one, which is free when they have ended.

        Raises:
            TypeError, ValueError: naming the argument; the catalogue is as before.
        """
        with self._guard.changing(), _plain():
            items = self._items
            check = Check("Catalog.update", ("the catalogue", items.rows))
            if not isinstance(ids, Tensor):
                try:
                    ids = torch.as_tensor(ids, device=items.rows.device)
                except (TypeError, ValueError):
                    check.fail("ids", "be a tensor or a sequence of integers", repr(ids), TypeError)
                ids = ids if ids.numel() else ids.long()  # an empty list is one of floats
            check.tensor("ids", ids, "[m]", (None,), INTEGERS)
            if rows is None and bias is None:
                check.fail("rows", "be given, or bias", None)
            self._check(check, rows, bias, len(ids))
            check.within("ids", ids, 0, items.count - 1, "the last item")
            if len(ids) == 0:
                return
            ids, last = _last_of_each(ids)
            rows = None if rows is None else rows[last]
            bias = None if bias is None else bias[last]
            packed = None if rows is None else Filter.of(rows, self._dtype)
            many = len(ids) * BULK >= items.count
            items = items.copied(items.capacity, with_filter=True) if many else self._with_room(items.count)
            with nullcontext() if many else self._guard.writing():
                with _settled(items.rows.device):
                    items.write(ids, rows, bias, packed)
                self._items = items

    def append(self, rows: Tensor, *, bias: Tensor | None = None) -> range:
        """Adds items, and returns their ids, `N ... N + m - 1`.

        Args:
            rows: `[m, D]`, the dtype and device of the table.
            bias: `[m]`, where the catalogue has biases, and only there.

        O(m · D) time, amortised: where the room is used up, the catalogue moves to memory for twice its
        items, and holds both for the time of the copy.

        Raises:
            TypeError, ValueError: naming the argument; the catalogue is as before.
        """
        with self._guard.changing(), _plain():
            check = Check("Catalog.append", ("the catalogue", self._items.rows))
            self._check(check, rows, bias, None)
            first = self._items.count
            if bias is None and self._items.bias is not None:
                check.fail("bias", "be given: the catalogue has biases", None)
            new = range(first, first + len(rows))
            if not new:
                return new
            packed = Filter.of(rows, self._dtype)
            items = self._with_room(new.stop)
            with _settled(rows.device):  # nobody reads there yet
                items.write(slice(new.start, new.stop), rows, bias, packed)
            self._items = items.longer(new.stop)
            return new

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file: rows, biases, filter, and a description in its header.

        The file is written beside its place and renamed into it, so that a write that fails leaves the old
        one. Searches go on meanwhile, changes wait.

        Raises:
            ImportError: safetensors is not installed.
        """
        with self._guard.changing():
            file.write(Path(path), self._items, self._dtype)

    @classmethod
    def load(cls, path: str | os.PathLike[str], mmap: bool = True) -> Catalog:
        """The catalogue of a file, on the CPU.

        Args:
            mmap: maps the file into memory: it is read where and when a search comes to it, and processes
                share what was read. Changes stay in the process's own memory, the file remains as it is; it
                must not be written to or cut while it is mapped (`save` replaces it, which is fine). False
                reads all of it now.

        Raises:
            FileNotFoundError: there is none.
            CatalogFileError: the file is damaged, not a catalogue, or of another version.
            ImportError: safetensors is not installed.
        """
        items, dtype = file.read(Path(path), mmap)
        return cls(items, dtype)

    def __len__(self) -> int:
        return self._items.count

    @property
    def dtype(self) -> str:
        """Of the filter: "fp32" (none), "bf16" or "int8"."""
        return self._dtype

    @property
    def dim(self) -> int:
        return self._items.rows.shape[1]

    @property
    def device(self) -> torch.device:
        return self._items.rows.device

    @property
    def rows(self) -> Tensor:
        """`[N, D]`: a view, to be read only. An update that comes meanwhile changes it row by row."""
        return self._items.visible.rows

    @property
    def bias(self) -> Tensor | None:
        """`[N]`, or None; a view like `rows`."""
        return self._items.visible.bias

    @property
    def memory(self) -> int:
        """Bytes of all tensors that the catalogue refers to, its room for more items included."""
        return _bytes(self._items)

    def __repr__(self) -> str:
        items = self._items
        rows = str(items.rows.dtype).removeprefix("torch.")
        kind = f"{self._dtype} filter" if items.filter else "no filter"
        whose = f"room for {items.capacity:,}" if items.owned else "rows not copied"
        return (
            f"Catalog({items.count:,} items of dim {self.dim}, {rows}, {kind}, {self.device}, "
            f"{_bytes(items) / 2**20:,.1f} MiB, {whose})"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a Catalog is not pickled or copied: use save and load, or Catalog.pack on its rows")

    def _check(self, check: Check, rows: Any, bias: Any, count: int | None) -> None:
        """Of a change; without rows there are `count` biases."""
        items = self._items
        if rows is not None or count is None:
            check.tensor("rows", rows, "[m, D]", (count, self.dim), (items.rows.dtype,))
            count = len(rows)
        if bias is not None and items.bias is None:
            check.fail("bias", "be left out: the catalogue has none", type(bias).__name__)
        if bias is not None:
            check.tensor("bias", bias, "[m]", (count,), (torch.float32, items.rows.dtype))

    def _with_room(self, count: int) -> Items:
        """The items in memory that may be written, with room for so many."""
        items = self._items
        if items.owned and count <= items.capacity:
            return items
        return items.copied(items.count if count == items.count else max(count, 2 * items.count))


def _bytes(items: Items) -> int:
    return sum(x.numel() * x.element_size() for x in items.tensors.values())


@contextmanager
def _plain() -> Iterator[None]:
    """Tensors made here may be written later, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def _settled(device: torch.device) -> Iterator[None]:
    """Around writes on a device that works behind: after what was launched before, and ended when left."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    yield
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _last_of_each(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Different ids, rising, and where each stands last."""
    ids, order = ids.long().sort(stable=True)
    last = torch.ones_like(ids, dtype=torch.bool)
    last[:-1] = ids[1:] != ids[:-1]
    return ids[last], order[last]
