"""Trained heads at work: a user's list, events as they come, and which events carried a prediction."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .data import Ids, UnknownNameError
from .model import Candidates, CatalogDtype, History, RankingConfig, RetrievalConfig
from .tasks import LIKE, Encoded, RankingTask, RetrievalTask, restore


@dataclass(frozen=True)
class Recommendation:
    item: int
    probability: float  # that it is the user's next item, of all that the user has not seen
    click: float  # that the user will like it


@dataclass(frozen=True)
class Explanation:
    """Why an item's click probability is what it is: the weights of the user's events, in order of time."""

    user: int
    item: int
    click: float
    events: np.ndarray  # int64 [L], rows of the data set
    weights: np.ndarray  # float32 [L, H]; each head's add up to 1

    def heaviest(self, count: int) -> np.ndarray:
        """Places of the events with the largest mean weight, heaviest first."""
        return np.argsort(-self.weights.mean(1), kind="stable")[:count]


def load_heads(encoded: Encoded, folder: Path) -> tuple[RetrievalTask, RankingTask]:
    """Both heads from the folder that they were trained into; see `tasks.restore` for the errors."""
    heads = RetrievalTask(encoded, RetrievalConfig()), RankingTask(encoded, RankingConfig())
    for head in heads:
        restore(head, folder)
    return heads


class Recommender:
    """Both heads, loaded from the folder that they were trained into, and the catalogue of their items."""

    def __init__(
        self,
        encoded: Encoded,
        retrieval: RetrievalTask,
        ranking: RankingTask,
        catalog_dtype: CatalogDtype = "fp32",
    ) -> None:
        self.encoded = encoded
        self.retrieval = retrieval
        self.ranking = ranking
        self.catalog = retrieval.model.catalog(catalog_dtype)
        with torch.inference_mode():  # encoded once for all requests
            self.ranking_items, self.ranking_users = ranking.model.items(), ranking.model.users()

    @classmethod
    def load(cls, encoded: Encoded, folder: Path, catalog_dtype: CatalogDtype = "fp32") -> Recommender:
        """See `tasks.restore` for the errors, `Catalog.pack` for the dtype."""
        return cls(encoded, *load_heads(encoded, folder), catalog_dtype)

    def recommend(self, user: int, k: int) -> list[Recommendation]:
        """The k items not yet seen that the user most likely comes to next; fewer where no more are left."""
        return self.follow(user).recommend(k)

    def follow(self, user: int) -> UserSession:
        """A user who stays for a while and adds events."""
        return UserSession(self, user)

    def explain(self, user: int, item: int) -> Explanation:
        """The attention behind the item's click probability, after all of the user's events.

        Raises:
            UnknownNameError: the user has no events.
        """
        if self.encoded.data.lengths[user] == 0:
            raise UnknownNameError(f"user {self.encoded.data.user_names[user]} has no events to explain with")
        clicks, weights = self.ranking.judge(user, np.array([item]))
        span = self.encoded.data.history(user)
        return Explanation(user, item, clicks.item(), np.arange(span.start, span.stop), weights[0].numpy())


class UserSession:
    """A user's history, projected once: a further event costs its own projections and not the history's.

    The keys and values of every attention are kept (`KeyValueCache`). Answers are those of a recomputation
    over all events, within rounding. The retrieval head reads the last `window` events and counts positions
    from the first of these, so with more events than that each one moves all positions, and it encodes the
    window anew.
    """

    def __init__(self, recommender: Recommender, user: int) -> None:
        self.user = user
        self._recommender = recommender
        encoded = recommender.encoded
        span = encoded.data.history(user)
        self._items: list[int] = encoded.data.item[span].tolist()
        self._levels: list[int] = encoded.levels[span].tolist()
        self._later: list[float] = []  # ratings of the events that were added
        self._ranking = recommender.ranking.model.caches()
        self._retrieval = recommender.retrieval.model.encoder.caches()
        self._state = recommender.catalog.rows.new_zeros(1, recommender.catalog.dim)  # before any event
        self._absorb(len(self._items))

    def add(self, item: int, rating: float) -> None:
        """An event that has just happened."""
        self._items.append(item)
        self._levels.append(self._recommender.encoded.level(rating))
        self._later.append(rating)
        self._absorb(1)

    @torch.inference_mode()
    def recommend(self, k: int) -> list[Recommendation]:
        """See `Recommender.recommend`."""
        catalog = self._recommender.catalog
        seen = torch.tensor(self._items, dtype=torch.long), torch.tensor([0, len(self._items)])
        scores, ids, lse = catalog.topk(self._state, min(k, len(catalog)), exclude=seen)
        there = ids[0] >= 0
        items = ids[0][there].numpy()
        probabilities = (scores[0] - lse).exp()[there]
        rows = zip(items.tolist(), probabilities.tolist(), self.clicks(items).tolist(), strict=True)
        return [Recommendation(*row) for row in rows]

    @torch.inference_mode()
    def clicks(self, items: Ids) -> Tensor:
        """The probability that the user will like each item, `[len(items)]`."""
        recommender, head = self._recommender, self._recommender.ranking
        ratings = np.array(self._later, dtype=np.float32)
        chosen = torch.from_numpy(items)
        candidates = Candidates(
            users=torch.full_like(chosen, self.user),
            items=chosen,
            statistics=head.statistics.now(self.user, items, (ratings, ratings >= LIKE)),
            offsets=torch.tensor([0, len(items)]),
        )
        user = recommender.ranking_users[candidates.users]
        logits = head.model.judge(candidates, recommender.ranking_items[chosen], user, self._ranking)
        return head.click_probability(logits)

    @torch.inference_mode()
    def _absorb(self, count: int) -> None:
        """Projects the last events."""
        if count == 0:
            return
        recommender, model = self._recommender, self._recommender.retrieval.model
        recommender.ranking.model.absorb(self._last(count), recommender.ranking_items, self._ranking)
        events, window = len(self._items), model.config.window
        if events > window:
            self._retrieval, count = model.encoder.caches(), window
        before = min(events, window) - count
        self._state = model.next_state(self._last(count), recommender.catalog.rows, self._retrieval, before)

    def _last(self, count: int) -> History:
        items, levels = (torch.tensor(x[-count:]) for x in (self._items, self._levels))
        return History(items, levels, torch.tensor([0, count]))
