"""JAX on the CPU, jitted: attention with its gradient, and the loss over a catalogue."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benches.case import Contender, Refused
from benches.jagged import PADDED, STRIDED, Batch, Layout, padding_mask
from benches.peers import need, need_device


def attention(batch: Batch) -> Contender:
    """`jax.nn.dot_product_attention`, dense or padded and masked, forward and backward."""
    if not batch.train:
        raise Refused("is compared where gradients are wanted")
    jax, jnp = _modules(batch.device)
    layout = _events_first(STRIDED if batch.dense else PADDED)
    mask = None if batch.dense or batch.causal else padding_mask(batch.events, batch.device)
    keep = None if mask is None else jnp.asarray(mask.numpy())[:, None, None, :]
    inputs = [
        to_jax(jnp, layout.to(x, n))
        for x, n in (
            (batch.query, batch.candidates),
            (batch.key, batch.events),
            (batch.value, batch.events),
            (batch.grad_out, batch.candidates),
        )
    ]

    @jax.jit
    def step(query: Any, key: Any, value: Any, grad_out: Any) -> Any:
        def attend(q: Any, k: Any, v: Any) -> Any:
            return jax.nn.dot_product_attention(q, k, v, mask=keep, is_causal=batch.causal)

        out, pull = jax.vjp(attend, query, key, value)
        return (out, *pull(grad_out))

    counts = [batch.candidates, batch.candidates, batch.events, batch.events]

    def read(raw: Any) -> list[Tensor]:
        return [layout.back(from_jax(x), n) for x, n in zip(raw, counts, strict=True)]

    note = "" if batch.dense else "padding not timed"
    return Contender(lambda: jax.block_until_ready(step(*inputs)), read, own_threads=True, note=note)


def cross_entropy(problem: Any) -> Contender:
    """Logits, log-sum-exp and both gradients, as XLA compiles them."""
    jax, jnp = _modules(problem.device)
    users, table = to_jax(jnp, problem.users), to_jax(jnp, problem.table)
    target = jnp.asarray(problem.target.numpy())

    @jax.jit
    def step(users: Any, table: Any) -> Any:
        def loss(u: Any, t: Any) -> Any:
            logits = (u @ t.T).astype(jnp.float32)
            aim = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
            return jnp.mean(jax.scipy.special.logsumexp(logits, axis=1) - aim)

        value, grads = jax.value_and_grad(loss, argnums=(0, 1))(users, table)
        return (value, *grads)

    return Contender(
        lambda: jax.block_until_ready(step(users, table)),
        lambda raw: [from_jax(x) for x in raw],
        own_threads=True,
    )


def _modules(device: torch.device) -> tuple[Any, Any]:
    need_device(device, "cpu")
    # Its pool has the size of the machine, and no switch changes that once it runs.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if torch.get_num_threads() != cores:
        raise Refused(f"takes all {cores} cores, where {torch.get_num_threads()} threads are asked for")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    return need("jax"), need("jax.numpy")


def _events_first(layout: Layout) -> Layout:
    """Of `[B, H, n, D]`, `[B, n, H, D]`."""
    return Layout(
        lambda rows, counts: layout.to(rows, counts).transpose(1, 2).contiguous(),
        lambda out, counts: layout.back(out.transpose(1, 2), counts),
    )


def to_jax(jnp: Any, x: Tensor) -> Any:
    if x.dtype == torch.bfloat16:
        return jnp.asarray(x.view(torch.int16).numpy()).view(jnp.bfloat16)
    return jnp.asarray(x.numpy())


def from_jax(x: Any) -> Tensor:
    array = np.array(x)  # a copy that may be written to
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
