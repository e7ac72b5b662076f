"""A ranking service: requests with Poisson arrivals and mixed lengths, answered by one process.

The model is the recommender's own `Ranking`, not trained: an encoder layer over the history, target attention
of each candidate over it, an MLP, a click probability. The vectors of users and items are computed once, as a
service does between two trainings. The peers are the same model and weights with `nn.MultiheadAttention` in
the places of attnrec's attention.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from attnrec.nn import FusedMultiHeadAttention
from attnrec.recommender.features import STATISTICS, Categories
from attnrec.recommender.model import Candidates, History, Ranking, RankingConfig
from benches import fused_multi_head_attention, target_attention
from benches.case import DTYPES, Case, Contender, Counts, Verdict, compare
from benches.lengths import log_normal, offsets
from benches.queueing import Answer, poisson, simulate, summary
from benches.run import OURS

OP = "serving"
LIMIT, LIMIT_OF_PEERS = 4.0, 10.0  # a whole model's roundings
CONFIG = RankingConfig(dim=64, heads=4, layers=1, hidden=64)
USERS, ITEMS, GENRES, LEVELS = 1_000, 20_000, 20, 5
LOAD = 0.7  # arrivals a second, as a part of what plain PyTorch can answer


@dataclass(frozen=True)
class Request:
    user: int
    history: Tensor  # ids [L]
    levels: Tensor  # ratings [L]
    candidates: Tensor  # ids [C]
    statistics: Tensor  # [C, S]


def requests(count: int, *, seed: int = 0) -> list[Request]:
    """20 … 1,000 candidates, 10 … 4,000 events, both with long tails."""
    generator = torch.Generator().manual_seed(seed)
    events = log_normal(count, 200, 1.0, 4000, seed=seed + 1)
    candidates = log_normal(count, 150, 0.8, 1000, seed=seed + 2)

    def draw(most: int, n: int) -> Tensor:
        return torch.randint(most, (n,), generator=generator)

    def request(n: int, c: int) -> Request:
        statistics = torch.randn(c, len(STATISTICS), generator=generator)
        return Request(int(draw(USERS, 1)), draw(ITEMS, n), draw(LEVELS, n), draw(ITEMS, c), statistics)

    return [request(max(n, 10), max(c, 20)) for n, c in zip(events, candidates, strict=True)]


# --- the model ----------------------------------------------------------------------------------------------


class Stored(nn.Module):
    """The vectors of all users or items, in the place of the encoder that computed them."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.register_buffer("vectors", vectors)

    def forward(self) -> Tensor:
        return self.vectors


def ranking_model() -> Ranking:
    """The same weights each time; of an item's features a genre, of a user's none."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        genres = Categories(
            torch.randint(GENRES, (ITEMS,)), torch.arange(ITEMS + 1), [f"genre {i}" for i in range(GENRES)]
        )
        model = Ranking(CONFIG, USERS, [], ITEMS, [genres], LEVELS).eval().requires_grad_(False)
        model.items, model.users = Stored(model.items()), Stored(model.users())
    return model


class PaddedAttention(nn.Module):
    """`nn.MultiheadAttention` in the place of the fused module: packed rows are padded to the longest of the
    batch, attended and packed again. A batch of one needs neither padding nor mask."""

    def __init__(self, fused: FusedMultiHeadAttention) -> None:
        super().__init__()
        attention = nn.MultiheadAttention(fused.embed_dim, fused.num_heads, batch_first=True)
        self.attention = attention.to(fused.in_proj_weight)
        self.attention.load_state_dict(fused.state_dict())

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        q_offsets: Tensor,
        kv_offsets: Tensor,
        is_causal: bool = False,
        **_: Any,
    ) -> tuple[Tensor, None]:
        if len(q_offsets) == 2:
            return self._attend(query[None], key[None], value[None], None, is_causal)[0], None
        queries, events = _places(q_offsets), _places(kv_offsets)
        padded = _padded(query, queries), _padded(key, events), _padded(value, events)
        # Padding comes last: a causal mask hides it from all that is real.
        return self._attend(*padded, None if is_causal else ~events, is_causal)[queries], None

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, is_causal: bool
    ) -> Tensor:
        mask = None
        if is_causal:
            n = query.shape[1]
            mask = torch.ones(n, n, dtype=torch.bool, device=query.device).triu(1)
        return self.attention(
            query,
            key,
            value,
            key_padding_mask=padding,
            need_weights=False,
            attn_mask=mask,
            is_causal=is_causal,
        )[0]


def _places(of: Tensor) -> Tensor:
    """`[B, n]`, True where a padded batch of these offsets has a row."""
    lengths = of.diff()
    return torch.arange(int(lengths.max()), device=of.device) < lengths[:, None]


def _padded(rows: Tensor, places: Tensor) -> Tensor:
    out = rows.new_zeros(*places.shape, rows.shape[-1])
    out[places] = rows
    return out


def by_pytorch(model: Ranking) -> Ranking:
    """A copy of the model with PyTorch's attention."""
    model = deepcopy(model)
    fused = [(n, m) for n, m in model.named_modules() if isinstance(m, FusedMultiHeadAttention)]
    for name, module in fused:
        model.set_submodule(name, PaddedAttention(module))
    return model


def answers(
    model: Callable[[Candidates, History], Tensor], dtype: torch.dtype, device: torch.device
) -> Answer:
    """The service: the click probabilities of each request's candidates."""

    def answer(batch: Sequence[Request]) -> list[Tensor]:
        counts = [len(request.candidates) for request in batch]
        users = torch.repeat_interleave(torch.tensor([r.user for r in batch]), torch.tensor(counts))
        candidates = Candidates(
            users.to(device),
            torch.cat([r.candidates for r in batch]).to(device),
            torch.cat([r.statistics for r in batch]).to(device, dtype),
            offsets(counts).to(device),
        )
        history = History(
            torch.cat([r.history for r in batch]).to(device),
            torch.cat([r.levels for r in batch]).to(device),
            offsets([len(r.history) for r in batch]).to(device),
        )
        with torch.inference_mode():
            probabilities = model(candidates, history)[:, -1].sigmoid()
        return list(probabilities.cpu().split(counts))  # where they are needed; and so the GPU has finished

    return answer


# --- the case: what one batch of requests takes -------------------------------------------------------------


class ServingProblem:
    """The click probabilities of some requests at once, one behind the other."""

    def __init__(self, batch: Sequence[Request], dtype: str, device: torch.device) -> None:
        self.batch, self.dtype, self.device = batch, DTYPES[dtype], device
        self.model = ranking_model().to(device, self.dtype)

    def counts(self) -> Counts:
        """Attention, projections and MLPs; of users and items the rows that are looked up."""
        candidates = [len(request.candidates) for request in self.batch]
        events = [len(request.history) for request in self.batch]
        dim, hidden, outputs, statistics = CONFIG.dim, CONFIG.hidden, LEVELS - 1, len(STATISTICS)
        size, rows, total = self.dtype.itemsize, sum(candidates), sum(events)
        of = partial(fused_multi_head_attention.count, dim=dim, heads=CONFIG.heads, size=size, train=False)
        target = of(sum(c * n for c, n in zip(candidates, events, strict=True)), rows, total)
        encoder = of(sum(n * (n + 1) // 2 for n in events), total, total)
        dense = dim * dim + (4 * dim + statistics) * hidden + (hidden + statistics) * outputs
        feed_forward = CONFIG.layers * 2.0 * total * 8 * dim * dim
        return Counts(
            target.flops + CONFIG.layers * encoder.flops + feed_forward + 2.0 * rows * dense,
            float(size * dim * (2 * rows + total)),
            target.exps + CONFIG.layers * encoder.exps,
        )

    def contender(self, model: Callable[[Candidates, History], Tensor]) -> Contender:
        answer = answers(model, self.dtype, self.device)
        return Contender(lambda: torch.cat(answer(self.batch)))

    def ours(self) -> Contender:
        return self.contender(self.model)

    def backend(self) -> str:
        dim = CONFIG.dim // CONFIG.heads
        return target_attention.backend_of(self.device, self.dtype, heads=CONFIG.heads, dim=dim)

    @cached_property
    def expected(self) -> tuple[list[list[Tensor]], list[Tensor]]:
        """By PyTorch's attention, request by request."""

        def results(model: Ranking, dtype: torch.dtype) -> list[Tensor]:
            answer = answers(model, dtype, self.device)
            return [torch.cat([answer([request])[0] for request in self.batch])]

        plain = by_pytorch(self.model)
        return [results(plain, self.dtype)], results(deepcopy(plain).double(), torch.float64)

    def check(self, results: Sequence[Tensor], *, ours: bool) -> Verdict:
        factor = LIMIT if ours else LIMIT_OF_PEERS
        return compare(results, *self.expected, factors=[factor], names=["probabilities"])


def _own(model: Ranking) -> Callable[..., Tensor]:
    return model


def _compiled(model: Ranking) -> Callable[..., Tensor]:
    """PyTorch's, compiled for any size."""
    return torch.compile(by_pytorch(model), dynamic=True)


MODELS: dict[str, Callable[[Ranking], Callable[..., Tensor]]] = {
    OURS: _own,
    "pytorch": by_pytorch,
    "pytorch-compiled": _compiled,
}


def plain(problem: ServingProblem) -> Contender:
    return problem.contender(by_pytorch(problem.model))


def compiled(problem: ServingProblem) -> Contender:
    torch._dynamo.reset()
    return problem.contender(_compiled(problem.model))


def serve(problem: ServingProblem, names: Sequence[str], *, count: int, most: int) -> dict[str, Any]:
    """Latencies and answers a second of each at one and the same stream of requests.

    The load is `LOAD` of what plain PyTorch answers one by one; where it did not run, of what ours does.
    """
    stream = requests(count)
    services = {name: answers(MODELS[name](problem.model), problem.dtype, problem.device) for name in names}
    for answer in services.values():  # what compiles, compiles before the clock runs
        for i in range(0, min(count, 4 * most), most):
            answer(stream[i : i + most])
    first = services.get("pytorch", services[OURS])
    some = stream[: min(count, 100)]
    start = time.perf_counter()
    for request in some:
        first([request])
    rate = LOAD * len(some) / (time.perf_counter() - start)
    arrivals = poisson(count, rate)
    latencies = simulate(list(services.values()), stream, arrivals, most=most, clock=time.perf_counter)
    return {
        "requests": count,
        "most_at_once": most,
        "arrivals_per_second": rate,
        "services": {name: summary(of, arrivals) for name, of in zip(services, latencies, strict=True)},
    }


def _case(suite: str, dtype: str, batch: int, *, count: int) -> Case:
    def make(device: torch.device) -> ServingProblem:
        return ServingProblem(requests(batch, seed=7), dtype, device)

    drawn = requests(batch, seed=7)
    sizes: dict[str, int | str] = {
        "B": batch,
        "H": CONFIG.heads,
        "T_c": sum(len(request.candidates) for request in drawn),
        "T_l": sum(len(request.history) for request in drawn),
        "E": CONFIG.dim,
    }
    peers = {"pytorch": plain} if suite == "smoke" else {"pytorch": plain, "pytorch-compiled": compiled}
    more = partial(serve, count=count, most=batch)
    return Case(OP, f"up-to-{batch}/{count}/{dtype}", suite, dtype, sizes, make, peers, more=more)


CASES = [
    _case("smoke", "fp32", 2, count=20),
    *(_case("standard", "fp32", batch, count=500) for batch in (1, 8)),
    _case("full", "bf16", 8, count=500),
]
