"""What the op tests share: random jagged batches, hypothesis strategies, comparison with the reference."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from hypothesis import strategies as st
from runners import RUNNER
from torch import Tensor

from attnrec import reference

DTYPES = list(RUNNER.dtypes)
OPTIONS = ("kv_lengths", "visible", "self", "key_bias")

# Around the sizes at which kernels change their ways: vectors, blocks, tiles.
LENGTHS = [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 255, 256, 257]


# --- jagged batches -----------------------------------------------------------------------------------------


def make_offsets(counts: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
    """Counts per user as offsets `[B + 1]`."""
    return torch.tensor([0, *accumulate(counts)], dtype=dtype)


@dataclass(frozen=True)
class Jagged:
    """Arguments of the attention ops. `args` and `options` are those of `target_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    q_offsets: Tensor
    kv_offsets: Tensor
    kv_lengths: Tensor | None = None
    visible: Tensor | None = None
    self_key: Tensor | None = None
    self_value: Tensor | None = None
    key_bias: Tensor | None = None

    @property
    def args(self) -> tuple[Tensor, ...]:
        return self.query, self.key, self.value, self.q_offsets, self.kv_offsets

    @property
    def options(self) -> dict[str, Tensor | None]:
        names = ("kv_lengths", "visible", "self_key", "self_value", "key_bias")
        return {name: getattr(self, name) for name in names}

    @property
    def weights_args(self) -> tuple[Tensor, ...]:
        return self.query, self.key, self.q_offsets, self.kv_offsets

    @property
    def weights_options(self) -> dict[str, Tensor | None]:
        return {name: x for name, x in self.options.items() if name != "self_value"}

    def with_(self, **changes: Any) -> "Jagged":
        return replace(self, **changes)

    def to(self, device: torch.device) -> "Jagged":
        tensors = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors)

    def hidden(self) -> Tensor:
        """Bool `[T_l]`: the events that no candidate sees because of `kv_lengths`."""
        hidden = torch.zeros(self.key.shape[0], dtype=torch.bool)
        if self.kv_lengths is not None:
            for user, length in enumerate(self.kv_lengths.tolist()):
                hidden[int(self.kv_offsets[user]) + length : int(self.kv_offsets[user + 1])] = True
        return hidden


def make_jagged(
    candidates: Sequence[int],
    events: Sequence[int],
    *,
    heads: int = 4,
    kv_heads: int | None = None,
    dim: int = 32,
    dtype: torch.dtype = torch.float32,
    options: Iterable[str] = (),
    index_dtype: torch.dtype = torch.int64,
    spread: float = 1.0,
    seed: int = 0,
) -> Jagged:
    """A random batch of `len(candidates)` users, with `candidates[b]` candidates and room for `events[b]`
    events.

    `options` out of OPTIONS. Their values include the borders: length 0 and the full room, nothing and
    everything visible, a bias of -inf. `spread` is the standard deviation of queries and keys.
    """
    generator = torch.Generator(RUNNER.device).manual_seed(seed)
    kv_heads = heads if kv_heads is None else kv_heads
    rows, total = sum(candidates), sum(events)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def up_to(limits: Sequence[int]) -> Tensor:
        drawn = [int(torch.randint(-1, limit + 2, (), generator=generator)) for limit in limits]
        clamped = [min(max(x, 0), limit) for x, limit in zip(drawn, limits, strict=True)]
        return torch.tensor(clamped, dtype=index_dtype)

    options, extra = set(options), {}
    assert options <= set(OPTIONS), options
    if "kv_lengths" in options:
        extra["kv_lengths"] = up_to(events)
    if "visible" in options:
        extra["visible"] = up_to([room for c, room in zip(candidates, events, strict=True) for _ in range(c)])
    if "self" in options:
        extra["self_key"] = normal(rows, kv_heads, dim) * spread
        extra["self_value"] = normal(rows, kv_heads, dim)
    if "key_bias" in options:
        hidden = torch.rand(total, heads, generator=generator) < 0.1
        extra["key_bias"] = normal(total, heads).float().masked_fill(hidden, -torch.inf)
        if dtype == torch.float64:
            extra["key_bias"] = extra["key_bias"].double()
    return Jagged(
        normal(rows, heads, dim) * spread,
        normal(total, kv_heads, dim) * spread,
        normal(total, kv_heads, dim),
        make_offsets(candidates, index_dtype),
        make_offsets(events, index_dtype),
        **extra,
    )


# --- hypothesis ---------------------------------------------------------------------------------------------


def lengths(largest: int = 257) -> st.SearchStrategy[int]:
    """Lengths of a history or numbers of candidates: mostly the borders, and anything between."""
    return st.sampled_from([n for n in LENGTHS if n <= largest]) | st.integers(0, largest)


@st.composite
def jagged_batches(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    dims: Sequence[int] = (8, 16, 20, 32, 64),
    users: int = 4,
    candidates: int = 33,
    events: int = 129,
) -> Jagged:
    """Batches of up to `users` users, with empty ones, every option on or off, grouped heads or not."""
    counts = draw(st.lists(st.tuples(lengths(candidates), lengths(events)), max_size=users))
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 3)]))
    return make_jagged(
        [c for c, _ in counts],
        [n for _, n in counts],
        heads=kv_heads * group,
        kv_heads=kv_heads,
        dim=draw(st.sampled_from(dims)),
        dtype=draw(st.sampled_from(dtypes)),
        options=draw(st.sets(st.sampled_from(OPTIONS))),
        index_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        seed=draw(st.integers(0, 2**31)),
    )


# --- comparison ---------------------------------------------------------------------------------------------


def assert_close_to_reference(
    got: Tensor, plain: Tensor, exact: Tensor, *, factor: float = 2.0, what: str = "result"
) -> None:
    """`max|got - exact| <= factor * max|plain - exact|` plus a rounding step of the result.

    `plain` is the same computation by plain PyTorch in the dtype of `got`, `exact` by float64: the tolerance
    calibrates itself by the error that PyTorch makes. Infinities must agree, and a NaN never does.
    """
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    assert got.dtype == plain.dtype, f"{what}: dtype {got.dtype}, not {plain.dtype}"
    got_wide, plain, exact = got.detach().double(), plain.detach().double(), exact.detach().double()
    finite = exact.isfinite()
    assert torch.equal(got_wide[~finite], exact[~finite]), f"{what}: infinities differ"
    assert got_wide[finite].isfinite().all(), f"{what}: not finite where the reference is"
    if not finite.any():
        return
    exact = exact[finite]
    error, of_plain = (got_wide[finite] - exact).abs().max(), (plain[finite] - exact).abs().max()
    allowed = factor * of_plain + torch.finfo(got.dtype).eps * exact.abs().max().clamp(min=2.0**-14)
    if got.dtype == torch.float64:  # `plain` is `exact` itself there
        allowed = 1e-12 * exact.abs().max().clamp(min=1.0)
    assert error <= allowed, (
        f"{what}: error {error:.3e}, allowed {allowed:.3e} (plain PyTorch {of_plain:.3e})"
    )


def _float64(x: Any) -> Any:
    return x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _leaf(x: Any) -> Any:
    return x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x


def outputs_and_grads(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    differentiate: Sequence[int] = (),
    without_grad: Sequence[str] = (),
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The function's outputs, and the gradients of its floating inputs by position or name.

    `differentiate` says which outputs have a gradient; it is the same random one in every dtype.
    `without_grad` names floating inputs that have none.
    """
    if differentiate:
        args = [_leaf(x) for x in args]
        kwargs = {name: x if name in without_grad else _leaf(x) for name, x in kwargs.items()}
    result = function(*args, **kwargs)
    outputs = list(result) if isinstance(result, tuple) else [result]
    if not differentiate:
        return outputs, {}
    generator = torch.Generator(RUNNER.device).manual_seed(1)
    grad_outputs = [
        torch.randn(outputs[i].shape, generator=generator, dtype=torch.float64).to(outputs[i].dtype)
        for i in differentiate
    ]
    inputs = {
        str(name): x for name, x in [*enumerate(args), *kwargs.items()] if getattr(x, "requires_grad", False)
    }
    differentiable = [outputs[i] for i in differentiate]
    # In an empty batch the reference has nothing to differentiate.
    if not any(x.requires_grad for x in differentiable):
        return outputs, {name: torch.zeros_like(x) for name, x in inputs.items()}
    grads = torch.autograd.grad(
        differentiable, list(inputs.values()), grad_outputs, allow_unused=True, materialize_grads=True
    )
    return outputs, dict(zip(inputs, grads, strict=True))


def assert_matches_reference(
    name: str,
    *args: Any,
    function: Callable[..., Any] | None = None,
    differentiate: Sequence[int] = (),
    without_grad: Sequence[str] = (),
    slack: float = 1.0,
    **kwargs: Any,
) -> None:
    """Holds op `name` (or `function` in its place) against `attnrec.reference`, outputs and gradients.

    Floating outputs and gradients by `assert_close_to_reference` (gradients with factor 3), integers exactly.
    `differentiate`: the indices of the outputs that have gradients, `(0, 1)` for `target_attention`.
    `slack` multiplies the factors: where a batch is a handful of numbers, by chance plain PyTorch has almost
    no error in them. So it is on the slow runners, whose sizes are cut: half as much again there.
    """
    slack *= 1.5 if RUNNER.thin else 1.0
    function = getattr(torch.ops.attnrec, name) if function is None else function
    meaning = getattr(reference, name)
    how = {"differentiate": differentiate, "without_grad": without_grad}
    got, got_grads = outputs_and_grads(function, args, kwargs, **how)
    plain, plain_grads = outputs_and_grads(meaning, args, kwargs, **how)
    wide_args, wide_kwargs = [_float64(x) for x in args], {key: _float64(x) for key, x in kwargs.items()}
    exact, exact_grads = outputs_and_grads(meaning, wide_args, wide_kwargs, **how)
    assert len(got) == len(exact)
    for i, (x, by_plain, by_exact) in enumerate(zip(got, plain, exact, strict=True)):
        if x.is_floating_point():
            assert_close_to_reference(x, by_plain, by_exact, factor=2.0 * slack, what=f"{name} output {i}")
        else:
            assert torch.equal(x, by_exact), f"{name} output {i} differs"
    assert got_grads.keys() == exact_grads.keys()
    for of, grad in got_grads.items():
        what = f"{name} gradient of {of}"
        assert_close_to_reference(grad, plain_grads[of], exact_grads[of], factor=3.0 * slack, what=what)
