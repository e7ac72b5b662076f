"""What the tests of the attention ops share: cases, and how a batch can change without changing a row."""

import random
from collections.abc import Iterator
from itertools import chain, combinations

import torch
from helpers import OPTIONS, Jagged, make_jagged, make_offsets
from runners import RUNNER
from torch import Tensor

import attnrec

INF, NAN = float("inf"), float("nan")

# Sets of an even size hold every combination of on and off of any three options.
SIZES = (0, 2, 4) if RUNNER.thin else range(len(OPTIONS) + 1)
OPTION_SETS = list(chain.from_iterable(combinations(OPTIONS, n) for n in SIZES))
HEADS = [(1, 1), (4, 4), (4, 2), (6, 2), (8, 1)]
DIMS = [1, 8, 12, 16, 24, 31, 32, 33, 48, 64, 80, 100, 128, 192, 255, 256]
if RUNNER.thin:
    DIMS = [1, 16, 31, 32, 48, 64, 80, 128, 255, 256]
# (candidates, events) around the edges of vectors, blocks, tiles and the backward's pieces of a history.
EDGES = [
    (1, 1),
    (2, 15),
    (5, 16),
    (6, 17),
    (7, 127),
    (8, 128),
    (9, 129),
    (63, 255),
    (64, 256),
    (65, 257),
    (17, 1023),
    (16, 1024),
    (129, 1025),
    (3, 2300),
]
if RUNNER.thin:
    EDGES = [(1, 1), (5, 16), (7, 127), (9, 129), (64, 256), (65, 257), (129, 1025), (3, 2300)]


def mixed(**changes) -> Jagged:
    """Five users: one without candidates, one without events, lengths on both sides of a tile."""
    return make_jagged([70, 0, 9, 1, 33], [129, 17, 0, 257, 64], **{"kv_heads": 2, **changes})


def below_zero(dtype: torch.dtype, **changes) -> Jagged:
    """Users with 1, 2, ... 72 events, whose scores are all far below 0. That is the score of a row of zeros:
    with one event too many nothing else would count."""
    batch = make_jagged(
        [1 + n % 3 for n in range(72)], range(1, 73), **{"heads": 1, "dim": 16, "dtype": dtype, **changes}
    )
    for name, value in {"query": 6.0, "key": -6.0, "self_key": -6.0}.items():
        if getattr(batch, name) is not None:
            getattr(batch, name)[..., 0] = value
    return batch


def without_self_slot(score: float = -INF, **changes) -> Jagged:
    """Every second row of a user has a self slot with that score, or below it. The third user sees nothing
    else, as its events are hidden, and the last one has none."""
    batch = make_jagged(
        [33, 2, 8, 6], [300, 7, 20, 0], **{"heads": 2, "dim": 16, "options": ["self", "key_bias"], **changes}
    )
    batch.key_bias[307:327] = -INF
    batch.query[..., 0] = batch.query[..., 0].abs() + 1
    for first, end in zip(batch.q_offsets[:-1].tolist(), batch.q_offsets[1:].tolist(), strict=True):
        batch.self_key[first:end:2] = 0
        batch.self_key[first:end:2, :, 0] = score
    return batch


def attend(batch: Jagged, **changes) -> tuple[Tensor, Tensor]:
    return attnrec.target_attention(*batch.args, return_lse=True, **{**batch.options, **changes})


def gradients(batch: Jagged, grad_out: Tensor, grad_lse: Tensor, **changes) -> dict[str, Tensor]:
    """Gradients of the batch's floating tensors by field, for gradients of `out` and `lse`."""
    leaves = {
        name: x.detach().requires_grad_()
        for name, x in vars(batch).items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }
    grads = torch.autograd.grad(
        attend(batch.with_(**leaves), **changes),
        list(leaves.values()),
        (grad_out, grad_lse),
        materialize_grads=True,
    )
    return dict(zip(leaves, grads, strict=True))


def of_user(batch: Jagged, user: int) -> tuple[Jagged, slice, slice]:
    """One user's part of a batch as a batch, and where its candidates and events lie."""
    rows = slice(int(batch.q_offsets[user]), int(batch.q_offsets[user + 1]))
    events = slice(int(batch.kv_offsets[user]), int(batch.kv_offsets[user + 1]))
    part = {
        "query": rows,
        "key": events,
        "value": events,
        "kv_lengths": slice(user, user + 1),
        "visible": rows,
        "self_key": rows,
        "self_value": rows,
        "key_bias": events,
    }
    tensors = {
        name: getattr(batch, name)[where] for name, where in part.items() if getattr(batch, name) is not None
    }
    device, dtype = batch.query.device, batch.q_offsets.dtype
    counts = rows.stop - rows.start, events.stop - events.start
    offsets = [make_offsets([n], dtype).to(device) for n in counts]
    return batch.with_(q_offsets=offsets[0], kv_offsets=offsets[1], **tensors), rows, events


def of_rows(batch: Jagged, chosen: Tensor) -> Jagged:
    """The batch of one user with only the chosen candidates, in the order given."""
    names = ("query", "visible", "self_key", "self_value")
    tensors = {name: getattr(batch, name)[chosen] for name in names if getattr(batch, name) is not None}
    offsets = make_offsets([len(chosen)], batch.q_offsets.dtype).to(batch.query.device)
    return batch.with_(q_offsets=offsets, **tensors)


def together(parts: list[Jagged]) -> Jagged:
    """Batches one after another as one."""
    tensors = {}
    for name in vars(parts[0]):
        if getattr(parts[0], name) is None:
            continue
        pieces = [getattr(part, name) for part in parts]
        if name in ("q_offsets", "kv_offsets"):
            counts = [n for piece in pieces for n in piece.diff().tolist()]
            tensors[name] = make_offsets(counts, pieces[0].dtype).to(pieces[0].device)
        else:
            tensors[name] = torch.cat(pieces)
    return parts[0].with_(**tensors)


def shuffled(users: int) -> list[int]:
    order = list(range(users))
    random.Random(1).shuffle(order)
    return order


def layouts(batch: Jagged) -> Iterator[tuple[str, Jagged]]:
    """The same numbers in other memory: (what is different, the batch)."""
    heads, kv_heads = batch.query.shape[1], batch.key.shape[1]

    def inside(x: Tensor, before: int, after: int) -> Tensor:  # a view into wider rows, whose rest is NaN
        wide = x.new_full((x.shape[0], before + x.shape[1] + after, x.shape[2]), NAN)
        wide[:, before : before + x.shape[1]] = x
        return wide[:, before : before + x.shape[1]]

    fused = torch.cat([inside(batch.key, heads, 0), batch.value], dim=1)  # [T_l, H + 2 H_kv, D]
    yield (
        "fused projection",
        batch.with_(
            query=inside(batch.query, 0, 2 * kv_heads),
            key=fused[:, -2 * kv_heads : -kv_heads],
            value=fused[:, -kv_heads:],
        ),
    )
    heads_first = {
        name: x.transpose(0, 1).contiguous().transpose(0, 1)
        for name, x in vars(batch).items()
        if isinstance(x, Tensor) and x.dim() > 1
    }
    yield "heads first", batch.with_(**heads_first)
    dims_first = {name: x.mT.contiguous().mT for name, x in heads_first.items()}
    yield "last dimension not contiguous", batch.with_(**dims_first)
    every_other = {
        name: x.repeat_interleave(2)[::2]
        for name, x in vars(batch).items()
        if isinstance(x, Tensor) and x.dim() == 1
    }
    yield "strided integers", batch.with_(**every_other)
