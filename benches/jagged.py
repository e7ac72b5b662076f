"""Attention batches: the inputs of the attention cases, and the layouts in which peers take them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from benches.case import DTYPES, Contender, Refused
from benches.lengths import offsets


@dataclass(frozen=True)
class Batch:
    """`query [T_c, H, D]`, `key` and `value [T_l, H_kv, D]`, and how many rows each user has of both.

    `causal`: candidate c of a user sees its first c + 1 events. `train`: the gradients are wanted too, for
    `grad_out [T_c, H, D]`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    candidates: list[int]
    events: list[int]
    q_offsets: Tensor
    kv_offsets: Tensor
    causal: bool = False
    train: bool = False
    grad_out: Tensor | None = None

    @property
    def users(self) -> int:
        return len(self.candidates)

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def dense(self) -> bool:
        """All users have as many candidates and events."""
        return len(set(self.candidates)) <= 1 and len(set(self.events)) <= 1

    @property
    def grouped(self) -> bool:
        return self.query.shape[1] != self.key.shape[1]

    @property
    def pairs(self) -> int:
        """Candidates times the events that each sees."""
        return sum(
            sum(min(i + 1, n) for i in range(c)) if self.causal else c * n
            for c, n in zip(self.candidates, self.events, strict=True)
        )

    @property
    def visible(self) -> Tensor | None:
        """As the ops' argument `visible`."""
        if not self.causal:
            return None
        prefixes = [
            torch.arange(1, c + 1).clamp(max=n) for c, n in zip(self.candidates, self.events, strict=True)
        ]
        return torch.cat(prefixes).to(self.device)

    def by_user(self) -> Iterator[Batch]:
        """Each user as a batch of its own."""
        row = event = 0
        for c, n in zip(self.candidates, self.events, strict=True):
            rows, events = slice(row, row + c), slice(event, event + n)
            yield replace(
                self,
                query=self.query[rows],
                key=self.key[events],
                value=self.value[events],
                candidates=[c],
                events=[n],
                q_offsets=offsets([c]).to(self.device),
                kv_offsets=offsets([n]).to(self.device),
                grad_out=None if self.grad_out is None else self.grad_out[rows],
            )
            row, event = row + c, event + n

    def double(self) -> Batch:
        wide = {name: getattr(self, name).double() for name in ("query", "key", "value")}
        return replace(self, **wide, grad_out=None if self.grad_out is None else self.grad_out.double())


def make_batch(
    candidates: Sequence[int],
    events: Sequence[int],
    *,
    heads: int,
    dim: int,
    kv_heads: int | None = None,
    dtype: str = "fp32",
    device: torch.device,
    causal: bool = False,
    train: bool = False,
) -> Batch:
    """Standard normal inputs, the same for a given shape."""
    generator = torch.Generator().manual_seed(0)
    rows, total, kv_heads = sum(candidates), sum(events), kv_heads or heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, DTYPES[dtype])

    return Batch(
        normal(rows, heads, dim),
        normal(total, kv_heads, dim),
        normal(total, kv_heads, dim),
        list(candidates),
        list(events),
        offsets(candidates).to(device),
        offsets(events).to(device),
        causal=causal,
        train=train,
        grad_out=normal(rows, heads, dim) if train else None,
    )


def other_orders(batch: Batch, count: int) -> Iterator[tuple[Batch, Callable[[list[Tensor]], list[Tensor]]]]:
    """The same batch with its sums in other orders, and the way back from its results to the batch's.

    The elements of a head are shuffled, and each user's events too where all of them are seen: exactly the
    same is computed, with other roundings. Results are `out` and the gradients of query, key and value.
    """
    generator = torch.Generator().manual_seed(1)

    def shuffle(n: int) -> Tensor:
        return torch.randperm(n, generator=generator)

    for _ in range(count):
        columns = shuffle(batch.query.shape[-1]).to(batch.device)
        starts = batch.kv_offsets[:-1].tolist()
        order = torch.arange if batch.causal else shuffle
        events = torch.cat([first + order(n) for first, n in zip(starts, batch.events, strict=True)])
        events = events.to(batch.device)
        shuffled = replace(
            batch,
            query=batch.query[..., columns],
            key=batch.key[events][..., columns],
            value=batch.value[events],
        )

        yield shuffled, partial(_in_order, columns=columns.argsort(), events=events.argsort())


def _in_order(results: list[Tensor], *, columns: Tensor, events: Tensor) -> list[Tensor]:
    out, *grads = results
    if not grads:
        return [out]
    query, key, value = grads
    return [out, query[..., columns], key[events][..., columns], value[events]]


# --- layouts ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """The way from rows `[T, H, D]` with so many of each user to a peer's layout, and back."""

    to: Callable[[Tensor, list[int]], Tensor]
    back: Callable[[Tensor, list[int]], Tensor]


def _need_dense(counts: list[int]) -> int:
    if len(set(counts)) > 1:
        raise Refused("takes dense batches only")
    return counts[0]


def _strided(rows: Tensor, counts: list[int]) -> Tensor:
    return rows.unflatten(0, (len(counts), _need_dense(counts))).transpose(1, 2)


def _from_dense(heads_first: Tensor, counts: list[int]) -> Tensor:
    return heads_first.transpose(1, 2).flatten(0, 1)


def _padded(rows: Tensor, counts: list[int]) -> Tensor:
    most = max(counts)
    padded = torch.stack([pad(part, (0, 0, 0, 0, 0, most - len(part))) for part in rows.split(counts)])
    return padded.transpose(1, 2).contiguous()


def _from_padded(heads_first: Tensor, counts: list[int]) -> Tensor:
    users = heads_first.transpose(1, 2)
    return torch.cat([user[:n] for user, n in zip(users, counts, strict=True)])


STRIDED = Layout(_strided, _from_dense)  # [B, H, n, D], a view of [B, n, H, D]: as projections give it
CONTIGUOUS = Layout(lambda rows, counts: _strided(rows, counts).contiguous(), _from_dense)
PADDED = Layout(_padded, _from_padded)  # [B, H, n, D], n the largest of the batch, zeros behind
PACKED = Layout(lambda rows, counts: rows, lambda rows, counts: rows)


def padding_mask(counts: list[int], device: torch.device) -> Tensor | None:
    """`[B, n]`, True for what is real; None where nothing is padded."""
    if len(set(counts)) <= 1:
        return None
    return (torch.arange(max(counts)) < torch.tensor(counts)[:, None]).to(device)


# --- contenders ---------------------------------------------------------------------------------------------


def torch_contender(
    batch: Batch,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    layout: Layout,
    *,
    note: str = "",
    inference: type = torch.inference_mode,
) -> Contender:
    """A contender of plain PyTorch: forward in inference mode, or forward and backward by autograd."""
    inputs = [
        layout.to(batch.query, batch.candidates),
        layout.to(batch.key, batch.events),
        layout.to(batch.value, batch.events),
    ]

    def read(raw: Any) -> list[Tensor]:
        out, *grads = raw if isinstance(raw, tuple) else (raw,)
        counts = [batch.candidates, batch.events, batch.events]
        return [
            layout.back(out, batch.candidates),
            *(layout.back(g, n) for g, n in zip(grads, counts if grads else [], strict=True)),
        ]

    if not batch.train:

        def forward() -> Tensor:
            with inference():
                return attend(*inputs)

        return Contender(forward, read, note=note)

    leaves = [x.detach().requires_grad_() for x in inputs]
    grad_out = layout.to(batch.grad_out, batch.candidates)

    def forward_and_backward() -> tuple[Tensor, ...]:
        out = attend(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad_out))

    return Contender(forward_and_backward, read, note=note)
