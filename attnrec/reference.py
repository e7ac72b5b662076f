"""What the ops mean, in plain PyTorch.

Readable, differentiable by PyTorch's own autograd, and no faster than it has to be. Every backend is tested
against these functions, and they serve where no backend can. They take the native, jagged form only and trust
their input: `attnrec.functional` is the public face, which checks it.

Shapes: `B` users, `C` candidates of a user, `L` events of a history, `T_c = sum C`, `T_l = sum L`, `H` query
heads, `H_kv` key/value heads, `D` head dim, `N` catalogue size. A batch of users is concatenated along the
first dimension; `offsets [B + 1]` say where each begins.

Precision: products of tensors are taken in the inputs' dtype, as plain PyTorch does; what follows them
(scaling, bias, softmax, log-sum-exp) in float32, or float64 for float64 input.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

INF = float("inf")


def _wide(tensor: Tensor) -> Tensor:
    """Float32, the dtype of all sums, or float64 where the input has it."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension and its log-sum-exp; a row with nothing to see gets zeros and -inf.

    Such a row is filled with zeros first and overwritten after: `-inf - -inf` would be NaN, and its gradient
    too.
    """
    nothing = (scores == -INF).all(-1, keepdim=True)
    safe = scores.masked_fill(nothing, 0.0)
    lse = safe.logsumexp(-1, keepdim=True).masked_fill(nothing, -INF)
    return safe.softmax(-1).masked_fill(nothing, 0.0), lse.squeeze(-1)


# --- target attention ---------------------------------------------------------------------------------------


def _prefixes(
    q_offsets: Tensor, kv_offsets: Tensor, kv_lengths: Tensor | None, visible: Tensor | None
) -> Iterator[tuple[Tensor, slice, int]]:
    """Yields `(rows, events, room)`: the candidates of one user that see the same events, a prefix of its
    history.

    The events that a candidate does not see are cut off and not masked, so that a NaN in them cannot leak,
    neither forward (0 * NaN in the weighted sum) nor backward.
    """
    q_bounds, kv_bounds = q_offsets.tolist(), kv_offsets.tolist()
    for user in range(len(q_bounds) - 1):
        rows = torch.arange(q_bounds[user], q_bounds[user + 1], device=q_offsets.device)
        first, room = kv_bounds[user], kv_bounds[user + 1] - kv_bounds[user]
        length = room if kv_lengths is None else int(kv_lengths[user])
        if visible is None:
            yield rows, slice(first, first + length), room
            continue
        prefix = visible[rows].clamp(max=length)
        for n in prefix.unique().tolist():
            yield rows[prefix == n], slice(first, first + n), room


def _shown(events: Tensor, bias: Tensor | None) -> Tensor:
    """`events [n, H, D]` with zeros in place of those that a bias of -inf hides, `bias [n, H]`."""
    return events if bias is None else events.where((bias != -INF).unsqueeze(-1), 0.0)


def _scores(
    query: Tensor, key: Tensor, scale: float | None, bias: Tensor | None, self_key: Tensor | None
) -> Tensor:
    """Scores `[c, H, n]` of `query [c, H, D]` for events `key [n, H_kv, D]`; the self slot's come last."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    group = query.shape[1] // key.shape[1]
    key = _shown(key.repeat_interleave(group, dim=1), bias)
    scores = _wide(torch.einsum("chd,nhd->chn", query, key)) * scale
    if bias is not None:
        scores = scores + _wide(bias).T
    if self_key is not None:
        self_key = self_key.repeat_interleave(group, dim=1)
        self_score = _wide(torch.einsum("chd,chd->ch", query, self_key)) * scale
        scores = torch.cat([scores, self_score.unsqueeze(-1)], dim=-1)
    return scores


def _rows_in_order(parts: list[Tensor], rows: list[Tensor], empty: Tensor) -> Tensor:
    """Per-prefix results put together and sorted by row; `empty` answers for a batch without rows."""
    return torch.cat(parts)[torch.cat(rows).argsort()] if parts else empty


def target_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    *,
    scale: float | None = None,
    kv_lengths: Tensor | None = None,
    visible: Tensor | None = None,
    self_key: Tensor | None = None,
    self_value: Tensor | None = None,
    key_bias: Tensor | None = None,
    max_kv_length: int | None = None,  # the most events of a user: for kernels that may not look
) -> tuple[Tensor, Tensor]:
    """Every candidate's softmax over its user's history: `(out [T_c, H, D], lse [T_c, H])`."""
    group = query.shape[1] // key.shape[1]
    all_rows, outs, lses = [], [], []
    for rows, events, _ in _prefixes(q_offsets, kv_offsets, kv_lengths, visible):
        bias = None if key_bias is None else key_bias[events]
        own_key = None if self_key is None else self_key[rows]
        weights, lse = _softmax(_scores(query[rows], key[events], scale, bias, own_key))
        shown = _shown(value[events].repeat_interleave(group, dim=1), bias)
        of_events = weights[..., : shown.shape[0]].to(value.dtype)
        out = _wide(torch.einsum("chn,nhd->chd", of_events, shown))
        if self_value is not None:
            out = out + weights[..., -1:] * _wide(self_value[rows].repeat_interleave(group, dim=1))
        all_rows.append(rows)
        outs.append(out.to(query.dtype))
        lses.append(lse)
    return (
        _rows_in_order(outs, all_rows, query.new_zeros(query.shape)),
        _rows_in_order(lses, all_rows, _wide(query.new_zeros(query.shape[:2]))),
    )


def target_attention_weights(
    query: Tensor,
    key: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    *,
    scale: float | None = None,
    kv_lengths: Tensor | None = None,
    visible: Tensor | None = None,
    self_key: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Every weight: `(weights [sum C_b * L_b, H], offsets [B + 1])`, candidate by candidate, event by event.

    `L_b` is the user's room; hidden events have weight 0.
    """
    by_row: dict[int, Tensor] = {}
    for rows, events, room in _prefixes(q_offsets, kv_offsets, kv_lengths, visible):
        bias = None if key_bias is None else key_bias[events]
        own_key = None if self_key is None else self_key[rows]
        weights, _ = _softmax(_scores(query[rows], key[events], scale, bias, own_key))
        n = events.stop - events.start
        padded = F.pad(weights[..., :n], (0, room - n))
        by_row.update(zip(rows.tolist(), padded.transpose(1, 2), strict=True))
    weights = [by_row[row] for row in sorted(by_row)]
    offsets = F.pad((q_offsets.diff().long() * kv_offsets.diff().long()).cumsum(0), (1, 0))
    empty = query.new_zeros(0, query.shape[1])
    return (torch.cat(weights).to(query.dtype) if weights else empty), offsets


def target_attention_top(
    query: Tensor,
    key: Tensor,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    top: int,
    *,
    scale: float | None = None,
    kv_lengths: Tensor | None = None,
    visible: Tensor | None = None,
    self_key: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The `top` heaviest events, heaviest first, ties by the earlier event: `(weights, events)`, `[T_c, H,
    top]`.

    Events are numbered within the user's history. Where fewer are seen: weight 0, event -1.
    """
    all_rows, all_weights, all_events = [], [], []
    for rows, events, _ in _prefixes(q_offsets, kv_offsets, kv_lengths, visible):
        bias = None if key_bias is None else key_bias[events]
        own_key = None if self_key is None else self_key[rows]
        scores = _scores(query[rows], key[events], scale, bias, own_key)
        weights, _ = _softmax(scores)
        # By score and not by weight: a weight that underflows to 0 is still ahead of another one.
        of_events = scores[..., : events.stop - events.start]
        best = of_events.sort(dim=-1, descending=True, stable=True)
        ids = best.indices[..., :top].masked_fill(best.values[..., :top] == -INF, -1)
        missing = top - ids.shape[-1]
        all_rows.append(rows)
        all_weights.append(F.pad(weights.gather(-1, best.indices[..., :top]), (0, missing)).to(query.dtype))
        all_events.append(F.pad(ids, (0, missing), value=-1))
    shape = (*query.shape[:2], top)
    return (
        _rows_in_order(all_weights, all_rows, query.new_zeros(shape)),
        _rows_in_order(all_events, all_rows, query.new_full(shape, -1, dtype=torch.int64)),
    )


# --- softmax over candidates and over the catalogue ---------------------------------------------------------


def _logits(
    users: Tensor, items: Tensor, temperature: float, bias: Tensor | None, logq: Tensor | None = None
) -> Tensor:
    """Logits `[..., n]` of `users [..., D]` for `items [n, D]`; one hidden by a bias of -inf is not read."""
    if bias is not None:
        items = items.where((bias != -INF).unsqueeze(-1), 0.0)
    logits = _wide(users @ items.T) / temperature
    if bias is not None:
        logits = logits + _wide(bias)
    if logq is not None:
        logits = logits - _wide(logq)
    return logits


def softmax_score(
    users: Tensor, items: Tensor, offsets: Tensor, *, temperature: float = 1.0, bias: Tensor | None = None
) -> Tensor:
    """Every user's softmax over its candidates, `probabilities [T_c]`; `users [B, D]`, `items [T_c, D]`."""
    bounds = offsets.tolist()
    parts = []
    for user, first, last in zip(range(len(bounds) - 1), bounds[:-1], bounds[1:], strict=True):
        own_bias = None if bias is None else bias[first:last]
        parts.append(_softmax(_logits(users[user], items[first:last], temperature, own_bias))[0])
    return torch.cat(parts).to(users.dtype) if parts else users.new_zeros(0)


def catalog_topk(
    users: Tensor,
    catalog: Tensor,
    k: int,
    *,
    exclude_ids: Tensor | None = None,
    exclude_offsets: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    filter: Tensor | None = None,
    filter_scale: Tensor | None = None,
    filter_error: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best items of each user: `(scores [B, k], ids [B, k], lse [B])`, ties by the lower id.

    Excluded items are never returned and not part of `lse`. Where fewer than k are left: score -inf, id -1. A
    score that is NaN is as good as -inf (and makes `lse` NaN). `filter` and what belongs to it (see
    `catalog_filter`) change nothing but the time that it takes, and with it `lse` by 0.1 at most.
    """
    # Widened before the product, not after: the ids are those of the table as given, not of rounded scores.
    users, catalog = _wide(users), _wide(catalog)
    scores, ids, lses = [], [], []
    for user in range(users.shape[0]):
        logits = _logits(users[user], catalog, temperature, bias)
        if exclude_ids is not None and exclude_offsets is not None:
            excluded = exclude_ids[int(exclude_offsets[user]) : int(exclude_offsets[user + 1])]
            logits = logits.index_fill(0, excluded.long(), -INF)
        best = logits.masked_fill(logits.isnan(), -INF).sort(descending=True, stable=True)
        scores.append(best.values[:k])
        ids.append(best.indices[:k].masked_fill(best.values[:k] == -INF, -1))
        lses.append(logits.logsumexp(0))
    if not scores:
        return users.new_zeros(0, k), users.new_zeros(0, k, dtype=torch.int64), users.new_zeros(0)
    return torch.stack(scores), torch.stack(ids), torch.stack(lses)


FILTER_PANEL = 32  # items
FILTER_CODES = {"bf16": (torch.bfloat16, 2), "int8": (torch.uint8, 4)}  # and how many lie together
FILTER_SMALLEST, FILTER_LARGEST = 1e-30, 1e18  # what is rounded to 0, and a norm that is not bounded


def catalog_filter(rows: Tensor, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows `[N, D]` rounded, as a filter in front of them: `(codes, scale, error)`.

    `codes [ceil(N / 32), ceil(D / n), 32, n]`: item i, element d is `codes[i // 32, d // n, i % 32, d % n]`.
    "bf16": bfloat16, n = 2, `scale [0]`. "int8": uint8, n = 4, element = `scale[i] * (code - 128)`. What is
    beyond N or D is 0. `error [N, 2]`, bfloat16 and never too small: `|e - rounded e|` and `|e|` of each
    item; both inf, and its codes 0, where |e| is not finite or too large to compute with.
    """
    exact = _wide(rows).double()
    norm = exact.norm(dim=1)
    bounded = norm < FILTER_LARGEST
    exact = exact.masked_fill(~bounded.unsqueeze(1), 0.0)
    if dtype == "int8":
        largest = exact.abs().amax(1) if rows.shape[1] else exact.new_zeros(rows.shape[0])
        scale = torch.where(largest < FILTER_SMALLEST, 0.0, largest / 127).float()
        code = (exact / scale.double().unsqueeze(1)).nan_to_num(0.0, 0.0, 0.0).round().clamp(-127, 127)
        rounded, codes, zero = code * scale.double().unsqueeze(1), (code + 128).to(torch.uint8), 128
    else:
        scale = exact.new_empty(0, dtype=torch.float32)
        codes = exact.masked_fill(exact.abs() < FILTER_SMALLEST, 0.0).bfloat16()
        rounded, zero = codes.double(), 0
    error = torch.stack([(exact - rounded).norm(dim=1), norm], 1).masked_fill(~bounded.unsqueeze(1), INF)
    n = FILTER_CODES[dtype][1]
    items, dim = rows.shape
    codes = F.pad(codes, (0, -dim % n, 0, -items % FILTER_PANEL), value=zero)
    panels = codes.view(-1, FILTER_PANEL, codes.shape[1] // n, n).transpose(1, 2).contiguous()
    return panels, scale, _rounded_up(error)


def _rounded_up(x: Tensor) -> Tensor:
    """Numbers of at least 0 as bfloat16 that are not smaller."""
    near = x.bfloat16()
    above = (near.view(torch.int16) + 1).view(torch.bfloat16)  # the next one; inf stays where it is
    return torch.where(near.double() < x, above, near)


def catalog_cross_entropy(
    users: Tensor,
    table: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    logq: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    negatives: Tensor | None = None,
    in_batch: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row's softmax over the catalogue: `(loss [T], lse [T])`.

    With `negatives [M]` the softmax runs over the row's target and them, without those that equal the target.
    `in_batch` says that they are the batch's targets, so that ignored ones are not among them. Ignored rows
    have loss 0 and lse -inf. `logq` and label smoothing as in the public function.
    """
    kept = target != ignore_index
    rows, target = users[kept], target[kept].long()
    if negatives is None:
        logits = _logits(rows, table, temperature, bias, logq)
        lse = logits.logsumexp(-1)
        aim = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        if label_smoothing > 0.0:  # as torch: the target's share is spread evenly over all N classes
            aim = (1.0 - label_smoothing) * aim + label_smoothing * logits.mean(-1)
    else:
        negatives = negatives[negatives != ignore_index].long() if in_batch else negatives.long()

        def of(tensor: Tensor | None, ids: Tensor) -> Tensor | None:
            return None if tensor is None else tensor[ids]

        others = _logits(rows, table[negatives], temperature, of(bias, negatives), of(logq, negatives))
        others = others.masked_fill(negatives == target.unsqueeze(-1), -INF)
        aim = _wide(torch.einsum("td,td->t", rows, table[target])) / temperature
        if bias is not None:
            aim = aim + _wide(bias[target])
        if logq is not None:
            aim = aim - _wide(logq[target])
        lse = torch.cat([aim.unsqueeze(-1), others], dim=-1).logsumexp(-1)
    ignored = _wide(users.new_zeros(users.shape[0]))
    return ignored.masked_scatter(kept, lse - aim), torch.full_like(ignored, -INF).masked_scatter(kept, lse)
