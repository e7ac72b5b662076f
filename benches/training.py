"""A training step of a sequence recommender: causal encoder over jagged histories, loss over the catalogue.

Ours takes the histories packed, plain PyTorch padded; the parameters are the same. A step is the loss and all
gradients, without the optimizer, which is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attnrec
from benches import catalog_cross_entropy, target_attention
from benches.case import DTYPES, Case, Contender, Counts, Verdict, compare
from benches.lengths import log_normal, offsets

OP = "training"
LIMIT, LIMIT_OF_PEERS = 4.0, 10.0  # a whole model's roundings

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Block(nn.Module):
    """Pre-norm self-attention and feed-forward; works on any leading dimensions."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.feed = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        query, key, value = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        x = x + self.out(attend(query, key, value).flatten(-2))
        return x + self.feed(self.norm_2(x))


class Encoder(nn.Module):
    def __init__(self, items: int, dim: int, heads: int, layers: int, longest: int) -> None:
        super().__init__()
        self.items, self.positions = nn.Embedding(items, dim), nn.Embedding(longest, dim)
        nn.init.normal_(self.items.weight, std=dim**-0.5)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        x = self.items(ids) + self.positions(positions)
        for block in self.blocks:
            x = block(x, attend)
        return x


class StepProblem:
    """The mean loss and the gradient of every parameter."""

    def __init__(
        self,
        lengths: Sequence[int],
        items: int,
        dim: int,
        heads: int,
        layers: int,
        dtype: str,
        device: torch.device,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.lengths, self.device = list(lengths), device
        self.items, self.dim, self.heads, self.layers = items, dim, heads, layers
        self.model = self._model().to(device, DTYPES[dtype])
        drawn = torch.randint(items, (2, sum(lengths)), generator=generator).to(device)
        self.ids, self.target = drawn.unbind()
        self.positions = torch.cat([torch.arange(n) for n in lengths]).to(device)

    def _model(self) -> Encoder:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Encoder(self.items, self.dim, self.heads, self.layers, max(self.lengths))

    def counts(self) -> Counts:
        """Attention, projections and feed-forward of each layer, three times their forward, and the loss."""
        size, rows, dim = self.model.items.weight.element_size(), sum(self.lengths), self.dim
        attention = target_attention.count(
            sum(n * (n + 1) // 2 for n in self.lengths),
            rows,
            rows,
            heads=self.heads,
            kv_heads=self.heads,
            dim=dim // self.heads,
            size=size,
            train=True,
        )
        loss = catalog_cross_entropy.count(rows, self.items, dim=dim, size=size)
        linear = 3 * 2.0 * rows * 8 * dim * dim
        return Counts(
            self.layers * (attention.flops + linear) + loss.flops,
            self.layers * attention.bytes + loss.bytes,
            self.layers * attention.exps + loss.exps,
        )

    def contender(self, model: Encoder, loss: Callable[[], Tensor], note: str = "") -> Contender:
        parameters = list(model.parameters())

        def step() -> tuple[Tensor, ...]:
            value = loss()
            return (value.detach(), *torch.autograd.grad(value, parameters))

        return Contender(step, note=note)

    def ours(self) -> Contender:
        of = offsets(self.lengths).to(self.device)
        visible = self.positions + 1

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attnrec.target_attention(query, key, value, of, of, visible=visible)

        def loss() -> Tensor:
            rows = self.model(self.ids, self.positions, attend)
            return attnrec.catalog_cross_entropy(rows, self.model.items.weight, self.target)

        return self.contender(self.model, loss)

    def backend(self) -> str:
        dim, dtype = self.dim // self.heads, self.model.items.weight.dtype
        return target_attention.backend_of(self.device, dtype, heads=self.heads, dim=dim)

    def padded(self, model: Encoder, *, compiled: bool = False) -> Contender:
        """Plain PyTorch; the padding itself is not timed. The loss runs over the real positions only."""
        most = max(self.lengths)
        keep = (torch.arange(most) < torch.tensor(self.lengths)[:, None]).to(self.device)
        ids = torch.zeros(keep.shape, dtype=torch.int64, device=self.device).masked_scatter(keep, self.ids)
        positions = torch.arange(most, device=self.device)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

        index = keep.flatten().nonzero().squeeze(-1)

        def loss() -> Tensor:
            rows = model(ids, positions, attend).flatten(0, 1)[index]
            logits = rows @ model.items.weight.T
            return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), self.target)

        return self.contender(
            model,
            torch.compile(loss, dynamic=False) if compiled else loss,
            "padding not timed",
        )

    @cached_property
    def expected(self) -> tuple[list[list[Tensor]], list[Tensor]]:
        exact = self._model().to(self.device, torch.float64)
        exact.load_state_dict(self.model.state_dict())
        plain, wide = (list(self.padded(model).call()) for model in (self.model, exact))
        return [plain], wide

    def check(self, results: Sequence[Tensor], *, ours: bool) -> Verdict:
        names = ["loss", *(f"gradient of {name}" for name, _ in self.model.named_parameters())]
        factors = [LIMIT if ours else LIMIT_OF_PEERS] * len(names)
        return compare(results, *self.expected, factors=factors, names=names)


# --- cases --------------------------------------------------------------------------------------------------


def plain(problem: StepProblem) -> Contender:
    return problem.padded(problem.model)


def compiled(problem: StepProblem) -> Contender:
    torch._dynamo.reset()
    return problem.padded(problem.model, compiled=True)


def _case(
    suite: str,
    lengths: Sequence[int],
    items: int,
    dtype: str,
    *,
    dim: int = 64,
    heads: int = 2,
    layers: int = 2,
) -> Case:
    def make(device: torch.device) -> StepProblem:
        return StepProblem(lengths, items, dim, heads, layers, dtype, device)

    sizes = {"B": len(lengths), "H": heads, "L": max(lengths), "T_l": sum(lengths), "E": dim, "N": items}
    shape = f"{len(lengths)},{heads},{max(lengths)},{dim},{items}"
    peers = {"pytorch": plain} if suite == "smoke" else {"pytorch": plain, "pytorch-compiled": compiled}
    return Case(OP, f"encoder-step/{shape}/{dtype}", suite, dtype, sizes, make, peers)


_HISTORIES = log_normal(64, 60, 0.8, 200)
CASES = [
    _case("smoke", [9, 1, 5], 500, "fp32", dim=32),
    _case("standard", _HISTORIES, 10_000, "fp32"),
    _case("full", _HISTORIES, 10_000, "bf16"),
    _case("full", _HISTORIES, 100_000, "fp32"),
]
