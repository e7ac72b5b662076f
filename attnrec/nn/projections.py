"""The projections in front of the attention, and the choice of what to project.

A head's scores are `(W_q x_c) . (W_k x_l) = (W_k^T W_q x_c) . x_l` and its result is
`sum_l w_l W_v x_l = W_v sum_l w_l x_l`. With many events and few candidates it is cheaper to project the
candidates into the history's space, attend over the raw history, and project the few sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .attention import FusedMultiHeadAttention

# Head dims of the fused kernels.
MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 256

# Floating-point operations in the time that one byte takes to or from memory: 234 GFLOP/s and 45 GB/s on two
# Zen 4 cores in fp32. An accelerator's figure is higher, which moves the choice towards fewer bytes.
FLOPS_PER_BYTE = 5

# Floating-point operations in the time of the further calls that the raw history takes: some 60 us there.
CALLS_OF_RAW_HISTORY = 14_000_000


def project(
    module: FusedMultiHeadAttention, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[..., H, D]` of rows `[..., E]`; one GEMM for inputs that are one tensor.

    The results are views of what the GEMMs wrote.
    """
    heads, dim = module.num_heads, module.head_dim
    weight, bias = module.in_proj_weight, module.in_proj_bias
    if weight is not None and query is key and key is value:
        return _split(F.linear(query, weight, bias), 3, heads, dim).unbind(-3)
    if weight is not None and key is value:
        # Split, which differentiates into one concatenation; slices would each fill a gradient of the whole.
        sizes = (module.embed_dim, 2 * module.embed_dim)
        w_q, w_kv = torch.split_with_sizes(weight, sizes)
        b_q, b_kv = (None, None) if bias is None else torch.split_with_sizes(bias, sizes)
        k, v = _split(F.linear(key, w_kv, b_kv), 2, heads, dim).unbind(-3)
        return _split(F.linear(query, w_q, b_q), heads, dim), k, v
    (w_q, w_k, w_v), (b_q, b_k, b_v) = split_in_projection(module)
    q, k, v = F.linear(query, w_q, b_q), F.linear(key, w_k, b_k), F.linear(value, w_v, b_v)
    return _split(q, heads, dim), _split(k, heads, dim), _split(v, heads, dim)


def _split(x: Tensor, *sizes: int) -> Tensor:
    """The last dimension as several."""
    return x.view(*x.shape[:-1], *sizes)


def split_in_projection(
    module: FusedMultiHeadAttention,
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Weights `(W_q, W_k, W_v)` and biases of the input projection."""
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = (None, None, None) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    return weights, biases


def project_candidates(module: FusedMultiHeadAttention, query: Tensor) -> Tensor:
    """The queries `[T_c, E]` in the space of the raw history: `[T_c, H, kdim]`.

    The key's bias adds the same to all scores of a candidate, which the softmax does not see.
    """
    (w_q, w_k, _), (b_q, _, _) = split_in_projection(module)
    heads, dim = module.num_heads, module.head_dim
    q = _split(F.linear(query, w_q, b_q), heads, dim)
    return _per_head(q, w_k.view(heads, dim, -1))


def project_sums(module: FusedMultiHeadAttention, sums: Tensor, lse: Tensor) -> Tensor:
    """Weighted sums `[T_c, H, vdim]` of the raw history to weighted sums of values `[T_c, H, D]`.

    The weights add up to 1, so the value's bias comes out once; where nothing was seen (an `lse` of -inf)
    they add up to 0, and so does the result.
    """
    (_, _, w_v), (_, _, b_v) = split_in_projection(module)
    heads, dim = module.num_heads, module.head_dim
    out = _per_head(sums, w_v.view(heads, dim, -1).mT)
    if b_v is None:
        return out
    seen = (lse > -torch.inf).unsqueeze(-1)
    return out + b_v.to(out.dtype).view(heads, dim) * seen


def _per_head(x: Tensor, weight: Tensor) -> Tensor:
    """`x [T, H, m]` times each head's `weight [H, m, n]`: `[T, H, n]`."""
    return (x.transpose(0, 1) @ weight).transpose(0, 1)


def cost_of_projected_history(
    events: int, pairs: int, embed_dim: int, kdim: int, vdim: int, itemsize: int
) -> int:
    """Cost, in operations, of projecting the history to keys and values and attending to these.

    `events` is the total over the batch, `pairs` the sum over the users of candidates times events,
    `itemsize` is in bytes; a byte counts `FLOPS_PER_BYTE` operations.
    """
    flops = 2 * events * (kdim + vdim) * embed_dim + 4 * pairs * embed_dim
    # Raw events are read; keys and values are written, then read.
    traffic = events * (kdim + vdim + 4 * embed_dim) * itemsize
    return flops + FLOPS_PER_BYTE * traffic


def cost_of_raw_history(
    candidates: int, events: int, pairs: int, embed_dim: int, num_heads: int, dim: int, itemsize: int
) -> int:
    """Cost, in operations, of attending over the raw history, `dim` wide, with candidates in its space."""
    flops = 4 * candidates * dim * embed_dim + 4 * pairs * num_heads * dim
    # Raw events are read as keys and as values; each head's query and sum is written, then read.
    traffic = (2 * events * dim + 4 * candidates * num_heads * dim) * itemsize
    return flops + FLOPS_PER_BYTE * traffic + CALLS_OF_RAW_HISTORY


def prefers_raw_history(
    candidates: int,
    events: int,
    pairs: int,
    embed_dim: int,
    num_heads: int,
    kdim: int,
    vdim: int,
    itemsize: int,
) -> bool:
    """Whether attending over the raw history is possible and counts as cheaper."""
    if kdim != vdim or not MIN_HEAD_DIM <= kdim <= MAX_HEAD_DIM:
        return False  # it is one head of keys and values, as wide as the events are
    raw = cost_of_raw_history(candidates, events, pairs, embed_dim, num_heads, kdim, itemsize)
    return raw < cost_of_projected_history(events, pairs, embed_dim, kdim, vdim, itemsize)
