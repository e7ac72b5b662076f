"""The public functions.

Shapes: `B` users, `C` candidates of a user, `L` events of a history, `T_c = sum C`, `T_l = sum L`, `H` query
heads, `H_kv` key/value heads, `D` head dim, `N` catalogue size. Offsets are int32 or int64 `[B + 1]`, start
at 0, rise, and end at the number of rows: user b's rows are `offsets[b] ... offsets[b + 1] - 1`.
"""

from typing import Any, Literal

from torch import Tensor

from attnrec import layout, ops
from attnrec.catalog import Catalog
from attnrec.catalog.search import search


def _given(**options: Any) -> dict[str, Any]:
    """Those that are given: the dispatcher takes 3 us for an op's absent ones by name, a small call 16."""
    return {name: x for name, x in options.items() if x is not None}


def _native(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    q_offsets: Tensor | None,
    kv_offsets: Tensor | None,
    options: dict[str, Tensor | None],
) -> layout.Native:
    """Dense or nested input as the native form."""
    if q_offsets is not None or kv_offsets is not None:
        missing = "kv_offsets" if kv_offsets is None else "q_offsets"
        if q_offsets is not None and kv_offsets is not None:
            raise ValueError(f"{op}: key_padding_mask goes with dense input; jagged input takes kv_lengths")
        raise ValueError(f"{op}: {missing} must be given: jagged input needs q_offsets and kv_offsets")
    nested = isinstance(query, Tensor) and query.is_nested
    return (layout.from_nested if nested else layout.from_dense)(op, query, key, value, options)


def target_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_offsets: Tensor | None = None,
    kv_offsets: Tensor | None = None,
    *,
    scale: float | None = None,
    kv_lengths: Tensor | None = None,
    visible: Tensor | None = None,
    self_key: Tensor | None = None,
    self_value: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    max_kv_length: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Every candidate attends to its user's history: `softmax(scale * q . k + key_bias) v`.

    Three forms of input, answered in the same form:

    - jagged: `query [T_c, H, D]`, `key` and `value [T_l, H_kv, D]` with `q_offsets` and `kv_offsets [B + 1]`;
    - dense, without offsets: `query [B, H, C, D]`, `key` and `value [B, H_kv, L, D]`;
    - nested (`layout=torch.jagged`): `[B, j, H, D]`, or its transpose `[B, H, j, D]`.

    Args:
        query, key, value: float32, bfloat16, float16 or float64, all the same. `H` is a multiple of `H_kv`:
            query head h reads key/value head `h // (H // H_kv)`. Any strides.
        scale: factor of `q . k`, `1 / sqrt(D)` by default.
        kv_lengths: int `[B]`. Only the first `kv_lengths[b]` events of user b exist; the rest is room.
        visible: int `[T_c]` (dense `[B, C]`). The candidate sees only the first `visible[c]` events of its
            history.
        self_key, self_value: `[T_c, H_kv, D]` (dense `[B, H_kv, C, D]`). The self slot: each candidate
            attends to the history and to this one more event of its own.
        key_bias: float32 or the query's dtype, `[T_l, H]` (dense `[B, H, L]`). Added to the scores of an
            event; -inf hides it.
        key_padding_mask: bool `[B, L]`, dense input only. True hides, as in torch.
        max_kv_length: the events of the longest history, or more, where the caller knows it: a GPU's
            offsets are not looked at, and a kernel that need not be ready for more than 1,024 events is
            faster, by the performance model (docs/gpu-model.md). Results are the same to the bit. Dense
            input says it by itself.
        return_lse: also return the scores' log-sum-exp (natural logarithm; self slot and bias included).

    Returns:
        `out` in the query's form and dtype; with `return_lse` also `lse`, float32 (float64 for float64),
        `[T_c, H]` (dense `[B, H, C]`). A candidate that sees nothing gets zeros, lse -inf and zero gradients.
    """
    options = _given(
        scale=scale,
        kv_lengths=kv_lengths,
        visible=visible,
        self_key=self_key,
        self_value=self_value,
        key_bias=key_bias,
        key_padding_mask=key_padding_mask,
    )
    if q_offsets is not None and kv_offsets is not None and key_padding_mask is None:
        if max_kv_length is not None:
            options["max_kv_length"] = max_kv_length
        out, lse = ops.call("target_attention", query, key, value, q_offsets, kv_offsets, **options)
        return (out, lse) if return_lse else out
    scaled = {} if scale is None else {"scale": options.pop("scale")}
    native = _native("target_attention", query, key, value, q_offsets, kv_offsets, options)
    out, lse = ops.call(
        "target_attention",
        native.query,
        native.key,
        native.value,
        native.q_offsets,
        native.kv_offsets,
        **scaled,
        **native.options,
        **_given(max_kv_length=native.max_kv_length if max_kv_length is None else max_kv_length),
    )
    return (native.rows(out), native.rows(lse)) if return_lse else native.rows(out)


def target_attention_weights(
    query: Tensor,
    key: Tensor,
    q_offsets: Tensor | None = None,
    kv_offsets: Tensor | None = None,
    *,
    scale: float | None = None,
    kv_lengths: Tensor | None = None,
    visible: Tensor | None = None,
    self_key: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    top: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The weights of `target_attention`, all of them or the `top` heaviest of each candidate and head.

    Arguments as in `target_attention`. With a self slot the events' weights add up to less than 1; the rest
    is the self slot's. Forward only: a request for a gradient raises.

    Returns:
        Without `top`, jagged: `(weights [sum C_b * L_b, H], offsets [B + 1])`, user by user, candidate by
        candidate, event by event, `L_b` the user's room (`kv_offsets[b + 1] - kv_offsets[b]`), hidden events
        0. Dense: `weights [B, H, C, L]`. Nested: a nested `[B, j, H]` with `C_b * L_b` rows of each user.

        With `top`: `(weights, events)`, each `[T_c, H, top]` (dense `[B, H, C, top]`, nested in the query's
        form): heaviest first, ties by the earlier event, `events` int64 and numbered within the user's
        history. Where a candidate sees fewer: weight 0, event -1.
    """
    options = {"kv_lengths": kv_lengths, "visible": visible, "self_key": self_key, "key_bias": key_bias}
    native = None
    if q_offsets is None or kv_offsets is None or key_padding_mask is not None:
        options["key_padding_mask"] = key_padding_mask
        native = _native("target_attention_weights", query, key, None, q_offsets, kv_offsets, options)
        query, key, q_offsets, kv_offsets = native.query, native.key, native.q_offsets, native.kv_offsets
        options = native.options
    if top is None:
        weights, offsets = ops.call(
            "target_attention_weights", query, key, q_offsets, kv_offsets, scale=scale, **options
        )
        return (weights, offsets) if native is None else native.pairs(weights, offsets)
    weights, events = ops.call(
        "target_attention_top", query, key, q_offsets, kv_offsets, top, scale=scale, **options
    )
    return (weights, events) if native is None else (native.rows(weights), native.rows(events))


def softmax_score(
    users: Tensor,
    items: Tensor,
    offsets: Tensor | None = None,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Every user's softmax over its own candidates, `softmax(u . i / temperature + bias)`.

    Args:
        users: `[B, D]`.
        items: `[T_c, D]` with `offsets [B + 1]`; without offsets dense `[B, C, D]` or nested `[B, j, D]`.
        temperature: divides `u . i`; above 0.
        bias: `[T_c]` (dense `[B, C]`, nested `[B, j]`), added to the logits; -inf hides a candidate.

    Returns:
        Probabilities in the users' dtype, `[T_c]` (dense `[B, C]`, nested `[B, j]`), differentiable.
    """
    if offsets is not None:
        return ops.call("softmax_score", users, items, offsets, temperature=temperature, bias=bias)
    items, offsets, bias, back = layout.candidates(users, items, bias)
    return back(ops.call("softmax_score", users, items, offsets, temperature=temperature, bias=bias))


def catalog_topk(
    users: Tensor,
    catalog: Tensor | Catalog,
    k: int,
    *,
    exclude: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best items of the catalogue for each user, over logits `u . i / temperature + bias`. Exact.

    Args:
        users: `[B, D]`.
        catalog: `[N, D]`, `k <= N`; or a `Catalog`, whose own bias holds where none is given.
        exclude: `(ids, offsets [B + 1])`: items that a user is not to be given (already seen), in any order,
            repeats allowed.
        bias: `[N]`, added to the logits and part of the scores; -inf hides an item.
        temperature: divides `u . i`; above 0.

    Returns:
        `(scores [B, k], ids [B, k], lse [B])`: best first, ties by the lower id; ids int64, the others
        float32 (float64 for float64). `lse` runs over all items that are not excluded, so that `exp(score -
        lse)` is a probability. Where fewer than k are left: score -inf and id -1. An item whose score is NaN
        comes after all others, that is never (and `lse` is NaN). Forward only.
    """
    if isinstance(catalog, Catalog):
        return catalog.topk(users, k, exclude=exclude, bias=bias, temperature=temperature)
    return search(users, catalog, k, exclude=exclude, bias=bias, temperature=temperature)


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
    reduction: Literal["none", "mean", "sum"] = "mean",
    negatives: Tensor | Literal["in-batch"] | None = None,
) -> Tensor:
    """Cross-entropy of a softmax over the catalogue, logits `u . i / temperature + bias - logq`, in nats.

    Args:
        users: `[T, D]`, one row for each training position.
        table: `[N, D]`, the items.
        target: int `[T]`, ids of the table, or `ignore_index`: such a row has loss 0 and no gradient.
        temperature: divides `u . i`; above 0.
        bias: `[N]`, added to the logits, with gradient.
        logq: `[N]`, logarithm of each item's sampling probability, subtracted from the logits (logQ
            correction: Bengio and Senecal 2008; Yi et al. 2019), without gradient.
        label_smoothing: in [0, 1], as `torch.nn.functional.cross_entropy` over the N items. Not with
            negatives.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for the loss of each row,
            `[T]`.
        negatives: ids int `[M]`, shared by all rows: each row's softmax runs over its target and them, those
            equal to the row's own target masked (accidental hits). "in-batch" takes the batch's targets as
            they stand.

    Returns:
        The loss, float32 (float64 for float64). "mean" over no rows is NaN, as in torch.
    """
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(
            f"catalog_cross_entropy: reduction must be 'none', 'mean' or 'sum', got {reduction!r}"
        )
    if logq is not None and isinstance(logq, Tensor) and logq.requires_grad:
        raise ValueError(
            "catalog_cross_entropy: logq must not require a gradient, which it has not: detach it"
        )
    in_batch = isinstance(negatives, str)
    if in_batch:
        if negatives != "in-batch":
            raise ValueError(
                f"catalog_cross_entropy: negatives must be a tensor of ids or 'in-batch', got {negatives!r}"
            )
        negatives = target
    loss, _ = ops.call(
        "catalog_cross_entropy",
        users,
        table,
        target,
        temperature=temperature,
        bias=bias,
        logq=logq,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        negatives=negatives,
        in_batch=in_batch,
    )
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / (target != ignore_index).sum()
