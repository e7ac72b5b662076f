"""Trained heads at work: a user's list, and which events carried a prediction."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .data import UnknownNameError
from .model import CatalogDtype, RankingConfig, RetrievalConfig
from .tasks import Encoded, RankingTask, RetrievalTask, restore


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

    @classmethod
    def load(cls, encoded: Encoded, folder: Path, catalog_dtype: CatalogDtype = "fp32") -> Recommender:
        """See `tasks.restore` for the errors, `Catalog.pack` for the dtype."""
        return cls(encoded, *load_heads(encoded, folder), catalog_dtype)

    def recommend(self, user: int, k: int) -> list[Recommendation]:
        """The k items not yet seen that the user most likely comes to next; fewer where no more are left."""
        users = np.array([user])
        ends = self.encoded.data.lengths[users]
        lists = self.retrieval.lists(self.retrieval.model, users, ends, k, self.catalog)
        _, ids, probabilities = next(lists)
        there = ids[0] >= 0
        items = ids[0][there].numpy()
        clicks, _ = self.ranking.judge(user, items)
        rows = zip(items.tolist(), probabilities[0][there].tolist(), clicks.tolist(), strict=True)
        return [Recommendation(*row) for row in rows]

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
