"""The models: from features to encoders, attention weights, a weighted sum, a prediction, a ranked list.

    features of users, items ──► EntityEncoder ──► one vector each
    a user's events          ──► HistoryEncoder ─► one vector an event, knowing the events up to it
                                     │
       Retrieval: the last one asks the catalogue      Ranking: a candidate asks the history
       softmax over all items                          weights, weighted sum, click probability

Histories are jagged: the events of all users of a batch stand one after the other, and `offsets [B + 1]`
say where each begins. All attention, and the softmax over the catalogue, is attnrec's: nothing is padded, and
no matrix of scores exists. `T` events, `T_c` candidates, `E` model dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnrec import Catalog, catalog_cross_entropy
from attnrec.nn import FusedMultiHeadAttention

from .cache import KeyValueCache
from .features import STATISTICS, Categories, Feature

CatalogDtype = Literal["fp32", "bf16", "int8"]  # see Catalog.pack


class History(NamedTuple):
    """Events of a batch of users, packed."""

    items: Tensor  # int64 [T]
    levels: Tensor  # int64 [T], the rating as a number of the model's rating levels
    offsets: Tensor  # int64 [B + 1]

    def place(self) -> Tensor:
        """How many events of its user an event has before it, `[T]`."""
        lengths = self.offsets.diff()
        starts = torch.repeat_interleave(self.offsets[:-1], lengths)
        return torch.arange(len(self.items), device=starts.device) - starts

    def part(self, users: slice) -> History:
        """Those of some users in a row."""
        rows, offsets = _rows(self.offsets, users)
        return History(self.items[rows], self.levels[rows], offsets)


def _rows(offsets: Tensor, users: slice) -> tuple[slice, Tensor]:
    """The rows of some users in a row, and their own offsets."""
    offsets = offsets[users.start : users.stop + 1]
    return slice(int(offsets[0]), int(offsets[-1])), offsets - offsets[0]


class EntityEncoder(nn.Module):
    """Users or items as vectors: the sum of an embedding of the id and one of each feature."""

    def __init__(self, count: int, features: Sequence[Feature], dim: int, std: float) -> None:
        super().__init__()
        self.identity = nn.Parameter(torch.randn(count, dim) * std)
        self.tables = nn.ParameterList()
        self._kinds = [isinstance(feature, Categories) for feature in features]
        for number, feature in enumerate(features):
            # the features are the data set's, not the model's: not in the state_dict
            self.register_buffer(f"values{number}", feature.values, persistent=False)
            width = feature.values.shape[1] if not isinstance(feature, Categories) else len(feature.words)
            if isinstance(feature, Categories):
                self.register_buffer(f"offsets{number}", feature.offsets, persistent=False)
            self.tables.append(torch.randn(width, dim) * std)

    def forward(self) -> Tensor:
        """All entities, `[N, E]`."""
        out = self.identity
        for number, (table, categories) in enumerate(zip(self.tables, self._kinds, strict=True)):
            values = getattr(self, f"values{number}")
            if categories:
                offsets = getattr(self, f"offsets{number}")
                out = out + F.embedding_bag(values, table, offsets, mode="mean", include_last_offset=True)
            else:
                out = out + values @ table
        return out


class EncoderLayer(nn.Module):
    """A pre-norm transformer layer over packed rows: every event attends to the events up to itself."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = FusedMultiHeadAttention(dim, heads)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, offsets: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """With a cache `x` are one user's events after those of the cache, which they are added to."""
        normed = self.attention_norm(x)
        if cache is None:
            attended, _ = self.attention(
                normed,
                normed,
                normed,
                need_weights=False,
                is_causal=True,
                q_offsets=offsets,
                kv_offsets=offsets,
            )
        else:
            attended = cache.attend_causally(normed)
        x = x + self.dropout(attended)
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class HistoryEncoder(nn.Module):
    """Events as vectors `[T, E]`: an item seen through its rating, then layers of causal self-attention."""

    def __init__(
        self,
        dim: int,
        heads: int,
        layers: int,
        levels: int,
        dropout: float,
        std: float,
        gates: tuple[float, float],  # of the worst and the best rating at the start
    ) -> None:
        super().__init__()
        self.gate = nn.Embedding(levels, dim)
        nn.init.normal_(self.gate.weight, std=std)
        self.gate.weight.data += torch.linspace(*gates, levels)[:, None]
        self.shift = nn.Embedding(levels, dim)
        nn.init.normal_(self.shift.weight, std=std)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(EncoderLayer(dim, heads, dropout) for _ in range(layers))

    def caches(self) -> list[KeyValueCache]:
        """Empty ones, one a layer, to encode one user's events bit by bit."""
        return [KeyValueCache(layer.attention) for layer in self.layers]

    def forward(
        self,
        history: History,
        items: Tensor,
        positions: Tensor | None = None,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> Tensor:
        """`items [N, E]` is the catalogue's encoding, `positions [T, E]` is added where given.

        With `caches` the history is one user's events after those of the caches.
        """
        # F.embedding and not items[...]: its gradient is summed in a fixed order
        x = F.embedding(history.items, items)
        x = x * self.gate(history.levels) + self.shift(history.levels)
        x = self.dropout(x if positions is None else x + positions)
        for number, layer in enumerate(self.layers):
            x = layer(x, history.offsets, None if caches is None else caches[number])
        return x


@dataclass(frozen=True)
class RetrievalConfig:
    dim: int = 64
    heads: int = 2
    layers: int = 2
    window: int = 200  # events of a history that are read: the last ones
    dropout: float = 0.2
    std: float = 0.02  # of the embeddings at the start


class Retrieval(nn.Module):
    """From a history the next item: the last event's vector asks the whole catalogue."""

    def __init__(
        self, config: RetrievalConfig, item_count: int, item_features: Sequence[Feature], levels: int
    ) -> None:
        super().__init__()
        self.config = config
        self.items = EntityEncoder(item_count, item_features, config.dim, config.std)
        self.positions = nn.Embedding(config.window, config.dim)
        nn.init.normal_(self.positions.weight, std=config.std)
        self.encoder = HistoryEncoder(
            config.dim, config.heads, config.layers, levels, config.dropout, config.std, gates=(1.0, 1.0)
        )
        self.norm = nn.LayerNorm(config.dim)
        self.bias = nn.Parameter(torch.zeros(item_count))

    def loss(self, history: History, targets: Tensor) -> Tensor:
        """Cross-entropy of the next item at every position; `targets` int64 `[T]`."""
        items = self.items()
        states = self._states(history, items)
        return catalog_cross_entropy(states, items, targets, bias=self.bias)

    @torch.no_grad()
    def catalog(self, dtype: CatalogDtype = "fp32") -> Catalog:
        """The items as vectors, with their biases, prepared for `recommend`; `dtype` as of `Catalog.pack`."""
        return Catalog.pack(self.items(), dtype, bias=self.bias)

    def recommend(
        self, history: History, k: int, exclude: tuple[Tensor, Tensor], catalog: Catalog
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The k best items of the catalogue: `(scores [B, k], ids [B, k], lse [B])`, see `catalog_topk`.

        `exclude` is `(ids, offsets [B + 1])`, `catalog` what `self.catalog()` gave. A user without events
        gets what the item biases say.
        """
        return catalog.topk(self._last_states(history, catalog.rows), k, exclude=exclude)

    def next_loss(self, history: History, targets: Tensor) -> Tensor:
        """Cross-entropy of the item after each user's whole history; `targets` int64 `[B]`, result `[B]`."""
        items = self.items()
        states = self._last_states(history, items)
        return catalog_cross_entropy(states, items, targets, bias=self.bias, reduction="none")

    def next_state(
        self, history: History, items: Tensor, caches: Sequence[KeyValueCache], before: int
    ) -> Tensor:
        """The state `[1, E]` after one user's further events, which come after `before` in the caches.

        `caches` as `self.encoder.caches()` makes them; `catalog.topk(state, ...)` is `recommend`'s answer.
        """
        return self._states(history, items, caches, before)[-1:]

    def _last_states(self, history: History, items: Tensor) -> Tensor:
        states = F.pad(self._states(history, items), (0, 0, 1, 0))  # row 0 for users without events
        return states[torch.where(history.offsets.diff() > 0, history.offsets[1:], 0)]

    def _states(
        self,
        history: History,
        items: Tensor,
        caches: Sequence[KeyValueCache] | None = None,
        before: int = 0,
    ) -> Tensor:
        positions = self.positions(history.place() + before)
        return self.norm(self.encoder(history, items, positions, caches))


@dataclass(frozen=True)
class RankingConfig:
    dim: int = 32
    heads: int = 4
    layers: int = 0
    hidden: int = 32
    dropout: float = 0.2
    std: float = 0.1  # of the embeddings at the start
    level_weight: float = 0.5  # in the loss, of the rating levels other than the click's


class Candidates(NamedTuple):
    """Candidates of a batch of users, packed."""

    users: Tensor  # int64 [T_c]
    items: Tensor  # int64 [T_c]
    statistics: Tensor  # float [T_c, S], see features.Statistics
    offsets: Tensor  # int64 [B + 1]
    visible: Tensor | None = None  # int64 [T_c]: sees only so many first events; None: all of them

    def part(self, users: slice) -> Candidates:
        """Those of some users in a row."""
        rows, offsets = _rows(self.offsets, users)
        visible = None if self.visible is None else self.visible[rows]
        return Candidates(self.users[rows], self.items[rows], self.statistics[rows], offsets, visible)


class RankingCaches(NamedTuple):
    """What is projected of one user's events."""

    history: KeyValueCache  # that candidates attend to
    layers: list[KeyValueCache]


class Ranking(nn.Module):
    """The probability that a user will like a candidate, by target attention over the user's history."""

    def __init__(
        self,
        config: RankingConfig,
        user_count: int,
        user_features: Sequence[Feature],
        item_count: int,
        item_features: Sequence[Feature],
        levels: int,
    ) -> None:
        super().__init__()
        self.config = config
        dim, outputs = config.dim, levels - 1
        self.users = EntityEncoder(user_count, user_features, dim, config.std)
        self.items = EntityEncoder(item_count, item_features, dim, config.std)
        self.encoder = HistoryEncoder(
            dim, config.heads, config.layers, levels, config.dropout, config.std, gates=(-1.0, 1.0)
        )
        self.query_norm = nn.LayerNorm(dim)
        self.key_norm = nn.LayerNorm(dim)
        self.event_norm = nn.LayerNorm(dim)
        self.attention = FusedMultiHeadAttention(dim, config.heads)
        self.dropout = nn.Dropout(config.dropout)
        self.taste = nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(
            nn.Dropout(config.dropout),
            nn.Linear(4 * dim + len(STATISTICS), config.hidden),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, outputs),
        )
        self.known = nn.Linear(len(STATISTICS), outputs)
        self.user_bias = nn.Parameter(torch.zeros(user_count, 1))
        self.item_bias = nn.Parameter(torch.zeros(item_count, outputs))

    def forward(self, candidates: Candidates, history: History) -> Tensor:
        """Logits `[T_c, levels - 1]`: that the rating will be at least level 1, 2, ..."""
        items = self.items()
        item = self.dropout(F.embedding(candidates.items, items))
        user = self.dropout(F.embedding(candidates.users, self.users()))
        interest, _ = self._attend(item, items, candidates, history)
        return self._predict(candidates, item, user, interest)

    def absorb(self, history: History, items: Tensor, caches: RankingCaches) -> None:
        """Projects one user's further events; `items` is `self.items()`."""
        caches.history.append(*self._keys_and_values(history, items, caches.layers))

    def judge(self, candidates: Candidates, item: Tensor, user: Tensor, caches: RankingCaches) -> Tensor:
        """`forward` over what the caches hold; `item` and `user` `[T_c, E]` are the candidates' encodings."""
        return self._predict(candidates, item, user, caches.history.attend(self.query_norm(item)))

    def caches(self) -> RankingCaches:
        """Empty ones."""
        return RankingCaches(KeyValueCache(self.attention), self.encoder.caches())

    def _predict(self, candidates: Candidates, item: Tensor, user: Tensor, interest: Tensor) -> Tensor:
        match = item * (self.taste(interest) + user)
        features = torch.cat((item, user, interest, item * (interest + user), candidates.statistics), dim=-1)
        return (
            self.mlp(features)
            + self.known(candidates.statistics)
            + F.embedding(candidates.users, self.user_bias)
            + F.embedding(candidates.items, self.item_bias)
            + match.sum(-1, keepdim=True)
        )

    def weights(self, candidates: Candidates, history: History) -> tuple[Tensor, Tensor]:
        """The attention weights of every candidate over its user's events: `[sum C_b * L_b, H]`, offsets."""
        items = self.items()
        _, weights = self._attend(F.embedding(candidates.items, items), items, candidates, history, True)
        return weights

    def _attend(
        self,
        item: Tensor,
        items: Tensor,
        candidates: Candidates,
        history: History,
        need_weights: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        return self.attention(
            self.query_norm(item),
            *self._keys_and_values(history, items),
            need_weights=need_weights,
            average_attn_weights=False,
            q_offsets=candidates.offsets,
            kv_offsets=history.offsets,
            visible=candidates.visible,
        )

    def _keys_and_values(
        self, history: History, items: Tensor, caches: Sequence[KeyValueCache] | None = None
    ) -> tuple[Tensor, Tensor]:
        # the weights ask which events are like the candidate, their values say what the user thought of them
        keys = self.key_norm(F.embedding(history.items, items))
        return keys, self.event_norm(self.encoder(history, items, caches=caches))
