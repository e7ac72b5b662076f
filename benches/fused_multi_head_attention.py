"""The drop-in module against what it replaces: `nn.MultiheadAttention` and the hand-written one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from attnrec.nn import FusedMultiHeadAttention
from benches import target_attention
from benches.case import DTYPES, Case, Contender, Counts, Verdict, compare
from benches.lengths import log_normal

OP = "fused_multi_head_attention"
OURS, OURS_GRADIENT, PEERS = 3.0, 4.0, 10.0

Module = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # query, history, padding mask → output


class MultiHeadAttention(nn.Module):
    """As it stands in many repositories: four linear layers, the weights kept."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None = None):
        batch = query.shape[0]

        def heads(x: Tensor) -> Tensor:
            return x.view(batch, -1, self.num_heads, self.head_dim).transpose(1, 2)

        q, k, v = heads(self.query(query)), heads(self.key(key)), heads(self.value(value))
        scores = q @ k.transpose(-2, -1) / self.head_dim**0.5
        if padding is not None:
            scores = scores.masked_fill(padding[:, None, None, :], float("-inf"))
        weights = scores.softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2)), weights


def count(pairs: int, rows: int, events: int, *, dim: int, heads: int, size: int, train: bool) -> Counts:
    """The attention's work and that of four projections, which cost twice their forward in the backward.

    Of the events that are there only. Without gradients the cheaper of two ways counts: the history projected
    to keys and values, or the queries into the history's space and what they found there out of it.

    Args:
        pairs: queries times the events that each sees, summed over the users.
        rows, events: of all users.
        size: bytes of an element.
    """
    passes = 3 if train else 1
    attention = target_attention.count(
        pairs,
        rows,
        events,
        heads=heads,
        kv_heads=heads,
        dim=dim // heads,
        size=size,
        train=train,
    )
    projected = attention.flops + passes * 2.0 * dim * dim * (2 * rows + 2 * events)
    absorbed = 2.0 * dim * dim * 4 * rows + 2 * 2.0 * pairs * heads * dim
    read = size * (dim * (2 * rows + events) + 4 * dim * dim)
    flops = projected if train else min(projected, absorbed)
    return Counts(flops, float(passes * read), attention.exps)


class ModuleProblem:
    """The output; in training also the gradients of query, history and all parameters.

    Of the parameters' gradients that of the output projection's weight is compared: the one that every module
    has in the same form.
    """

    def __init__(
        self,
        candidates: int,
        lengths: Sequence[int],
        dim: int,
        heads: int,
        dtype: str,
        device: torch.device,
        train: bool,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.lengths, self.candidates, self.train, self.heads = list(lengths), candidates, train, heads

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, DTYPES[dtype])

        most = max(lengths)
        self.query, self.history = normal(len(lengths), candidates, dim), normal(len(lengths), most, dim)
        self.padding = None
        if len(set(lengths)) > 1:
            self.padding = (torch.arange(most) >= torch.tensor(self.lengths)[:, None]).to(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.module = nn.MultiheadAttention(dim, heads, batch_first=True).to(device, DTYPES[dtype])
        self.module.train(train)
        self.grad_out = normal(len(lengths), candidates, dim)

    def counts(self) -> Counts:
        dim, size = self.query.shape[-1], self.query.element_size()
        events = sum(self.lengths)
        return count(
            self.candidates * events,
            self.candidates * len(self.lengths),
            events,
            dim=dim,
            heads=self.heads,
            size=size,
            train=self.train,
        )

    def contender(self, module: nn.Module, attend: Module) -> Contender:
        query, history, padding = self.query, self.history, self.padding
        if not self.train:

            def forward() -> Tensor:
                with torch.inference_mode():
                    return attend(query, history, padding)

            return Contender(forward)
        leaves = [query.detach().requires_grad_(), history.detach().requires_grad_(), *module.parameters()]
        out_weight = next(i for i, x in enumerate(leaves) if x is _out_weight(module))

        def forward_and_backward() -> tuple[Tensor, ...]:
            out = attend(leaves[0], leaves[1], padding)
            return (out.detach(), *torch.autograd.grad(out, leaves, self.grad_out))

        return Contender(forward_and_backward, lambda raw: [*raw[:3], raw[1 + out_weight]])

    def ours(self) -> Contender:
        dim = self.query.shape[-1]
        fused = FusedMultiHeadAttention(dim, self.heads, batch_first=True).to(self.query)
        fused.load_state_dict(self.module.state_dict())
        fused.train(self.train)
        return self.contender(fused, _torch_style(fused))

    def backend(self) -> str:
        query = self.query
        dim = query.shape[-1] // self.heads
        return target_attention.backend_of(query.device, query.dtype, heads=self.heads, dim=dim)

    @cached_property
    def expected(self) -> tuple[list[list[Tensor]], list[Tensor]]:
        """By torch's module in the case's dtype and in float64, with the weights, which is its plain path."""

        def results(dtype: torch.dtype) -> list[Tensor]:
            module = deepcopy(self.module).to(dtype).train()
            query, history = (x.detach().to(dtype).requires_grad_() for x in (self.query, self.history))
            out = module(query, history, history, key_padding_mask=self.padding)[0]
            if not self.train:
                return [out.detach()]
            leaves = query, history, module.out_proj.weight
            return [out.detach(), *torch.autograd.grad(out, leaves, self.grad_out.to(dtype))]

        return [results(self.query.dtype)], results(torch.float64)

    def check(self, results: Sequence[Tensor], *, ours: bool) -> Verdict:
        factors = [OURS, *[OURS_GRADIENT] * 3] if ours else [PEERS] * 4
        names = ["output", "grad_query", "grad_history", "grad of out_proj.weight"]
        n = 4 if self.train else 1
        return compare(results, *self.expected, factors=factors[:n], names=names[:n])


# --- peers --------------------------------------------------------------------------------------------------


def _out_weight(module: nn.Module) -> Tensor:
    return module.out.weight if isinstance(module, MultiHeadAttention) else module.out_proj.weight


def _torch_style(module: nn.Module, need_weights: bool = False) -> Module:
    def attend(query: Tensor, history: Tensor, padding: Tensor | None) -> Tensor:
        return module(query, history, history, key_padding_mask=padding, need_weights=need_weights)[0]

    return attend


def torch_module(problem: ModuleProblem, *, need_weights: bool = False) -> Contender:
    module = deepcopy(problem.module)
    return problem.contender(module, _torch_style(module, need_weights))


def torch_compiled(problem: ModuleProblem) -> Contender:
    torch._dynamo.reset()
    module = deepcopy(problem.module)
    return problem.contender(
        module,
        torch.compile(_torch_style(module), dynamic=False),
    )


def hand_written(problem: ModuleProblem) -> Contender:
    """Four linear layers; returns its weights too, as such modules do."""
    source, dim = problem.module, problem.query.shape[-1]
    module = MultiHeadAttention(dim, problem.heads).to(problem.query).train(problem.train)
    parts = zip((module.query, module.key, module.value), source.in_proj_weight.chunk(3), strict=True)
    with torch.no_grad():
        for (linear, weight), bias in zip(parts, source.in_proj_bias.chunk(3), strict=True):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
    module.out.load_state_dict(source.out_proj.state_dict())
    return problem.contender(module, lambda q, h, padding: module(q, h, h, padding)[0])


# --- cases --------------------------------------------------------------------------------------------------

PEERS_OF_ALL = {
    "nn.MultiheadAttention": torch_module,
    "nn.MultiheadAttention+weights": partial(torch_module, need_weights=True),
    "hand-written": hand_written,
}


def _case(
    family: str,
    suite: str,
    candidates: int,
    lengths: Sequence[int],
    dim: int,
    heads: int,
    dtype: str,
    train: bool = False,
    compiled: bool = False,
) -> Case:
    def make(device: torch.device) -> ModuleProblem:
        return ModuleProblem(candidates, lengths, dim, heads, dtype, device, train)

    sizes = {"B": len(lengths), "H": heads, "C": candidates, "L": max(lengths), "E": dim}
    shape = f"{len(lengths)},{heads},{candidates},{max(lengths)},{dim}"
    peers = PEERS_OF_ALL | ({"compiled": torch_compiled} if compiled else {})
    return Case(OP, f"{family}/{shape}/{dtype}", suite, dtype, sizes, make, peers)


_LENGTHS = log_normal(48, 120, 1.0, 1024)  # padded, long-tailed histories
CASES = [
    _case("small", "smoke", 5, [9, 4], 32, 2, "fp32", train=True),
    _case("dense", "standard", 64, [200] * 16, 128, 4, "fp32", compiled=True),
    _case("dense", "standard", 64, [200] * 16, 128, 4, "bf16"),
    *(_case("padded", "standard", 100, _LENGTHS, 128, 4, dtype) for dtype in ("fp32", "bf16")),
    _case("request", "standard", 200, [1000], 64, 2, "fp32"),
    _case("one-candidate", "standard", 1, [1000] * 16, 128, 4, "fp32"),
    _case("dense-train", "standard", 64, [200] * 16, 128, 4, "fp32", train=True),
    _case("padded-train", "standard", 100, _LENGTHS, 128, 4, "fp32", train=True),
]
