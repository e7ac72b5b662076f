"""The two heads' protocols: which events train, how they are batched, what validation and test measure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnrec import Catalog

from .atomic import Column, DataSetError
from .checkpoint import CheckpointError, load_checkpoint, load_weights
from .clicks import click_metrics
from .data import TEST, TRAIN, VALID, Ids, Interactions, ranking_split, retrieval_split
from .evaluation import catalog_lists, evaluate
from .features import Categories, Feature, Statistics, encode
from .metrics import Jagged
from .model import Candidates, CatalogDtype, History, Ranking, RankingConfig, Retrieval, RetrievalConfig
from .train import OneProcess
from .vocabulary import Vocabulary

K = 10  # length of the lists that people see
KS = (5, K, 20)  # lengths that are measured
# With one right item a user recall is hr, map is mrr, and precision hr / k: they would say nothing new.
SHOWN = ("hr", "ndcg", "mrr", "coverage", "gini", "diversity", "novelty", "arp", "lift")
LIKE = 4.0  # a rating from here on is a click
EVALUATION_USERS = 64  # a batch
MOST_LEVELS = 10
OnLists = Callable[[Ids, Tensor, Tensor], None]


@dataclass(frozen=True)
class Encoded:
    """A data set as the models take it."""

    data: Interactions
    user_features: list[Feature]
    item_features: list[Feature]
    levels: Tensor  # int64 [T]: number of the event's rating among thresholds
    thresholds: list[float]  # a rating of level n is at least thresholds[n - 1]

    @property
    def items(self) -> Tensor:
        return torch.from_numpy(self.data.item)

    def vocabulary(self) -> Vocabulary:
        """The names of a model's rows."""
        return Vocabulary.of(self.data, self.user_features, self.item_features, self.thresholds)

    def level(self, rating: float) -> int:
        # in the data set's precision: a threshold is the float32 of 3.7, which is above 3.7
        return int(np.searchsorted(self.thresholds, np.float32(rating), side="right"))

    def rows(self, users: Ids, ends: Ids, starts: Ids | None = None) -> tuple[Tensor, Tensor]:
        """The events of users from place `starts` (or 0) up to `ends`, and the offsets of the users."""
        starts = np.zeros_like(ends) if starts is None else starts
        rows = _ranges(self.data.offsets[users] + starts, ends - starts)
        return torch.from_numpy(rows), F.pad(torch.from_numpy(ends - starts).cumsum(0), (1, 0))

    def history(self, users: Ids, ends: Ids, window: int | None = None) -> History:
        """The first `ends` events of users, or of these the last `window`."""
        rows, offsets = self.rows(users, ends, None if window is None else np.maximum(ends - window, 0))
        return History(self.items[rows], self.levels[rows], offsets)

    def seen(self, users: Ids, ends: Ids) -> Jagged:
        """What users had before `ends`, as `catalog_topk` excludes it."""
        rows, offsets = self.rows(users, ends)
        return self.items[rows], offsets

    def genres(self) -> Categories | None:
        """The first feature with several categories an item, for diversity; None without one."""
        bags = [f for f in self.item_features if isinstance(f, Categories) and (f.offsets.diff() > 1).any()]
        return bags[0] if bags else None

    def list_metrics(self, lists: Iterable[Tensor], users: Ids, ends: Ids) -> dict[str, float]:
        """The metrics of users' lists, in batches; the event after the first `ends` is what is right."""
        genres = self.genres()
        earlier = np.flatnonzero(retrieval_split(self.data) != TEST)
        pairs = np.unique(np.stack((self.data.user[earlier], self.data.item[earlier])), axis=1)
        found = evaluate(
            lists,
            (self.items[torch.from_numpy(self.data.offsets[users] + ends)], torch.arange(len(users) + 1)),
            KS,
            history=self.seen(users, ends),
            item_users=torch.from_numpy(np.bincount(pairs[1], minlength=len(self.data.item_names))),
            users=len(self.data.user_names),
            item_features=None if genres is None else genres.multi_hot(),
        )
        return {name: value for name, value in found.items() if name.split("@")[0] in SHOWN}

    def description(self) -> dict[str, Any]:
        """What a model of this data set depends on."""
        sizes = [
            f.values.shape[-1] if not isinstance(f, Categories) else len(f.words)
            for f in (*self.user_features, *self.item_features)
        ]
        return {
            "users": len(self.data.user_names),
            "items": len(self.data.item_names),
            "events": len(self.data.user),
            "features": sizes,
            "thresholds": self.thresholds,
        }


def encode_data(data: Interactions) -> Encoded:
    """
    Raises:
        DataSetError: the vectors of a feature are of different lengths.
    """
    levels, thresholds = _rating_levels(data.rating)
    return Encoded(
        data, _features(data.user_columns), _features(data.item_columns), torch.from_numpy(levels), thresholds
    )


def _features(columns: dict[str, Column]) -> list[Feature]:
    found = []
    for name, column in columns.items():
        try:
            found.append(encode(column))
        except ValueError as error:
            raise DataSetError(f"column {name}: {error}") from None
    return found


def _rating_levels(rating: np.ndarray) -> tuple[Ids, list[float]]:
    """Ratings as a few ordered levels: their values, or quantiles of them; LIKE is always a threshold."""
    values = np.unique(rating)
    if len(values) > MOST_LEVELS:
        values = np.unique(np.quantile(rating, np.linspace(0, 1, MOST_LEVELS + 1)[:-1]))
    thresholds = np.union1d(values[1:], [LIKE]).astype(np.float64)
    return np.searchsorted(thresholds, rating, side="right"), thresholds.tolist()


def _ranges(starts: Ids, lengths: Ids) -> Ids:
    """`starts[0], starts[0] + 1, ...`, so many as `lengths[0]`, and so on."""
    offsets = np.cumsum(lengths) - lengths
    return np.repeat(starts - offsets, lengths) + np.arange(int(lengths.sum()))


def user_batches(count: int, size: int, random: torch.Generator | None = None) -> Iterator[Ids]:
    """All users in batches, in a random order where `random` is given."""
    order = torch.arange(count) if random is None else torch.randperm(count, generator=random)
    for batch in order.split(size):
        yield batch.numpy()


def shuffle_ties(data: Interactions, rows: Ids, random: torch.Generator) -> Tensor:
    """Which event stands where `[T]`, with those of `rows` that have one user and timestamp in a new order.

    Which of them came first is not known (half of MovieLens-100k's events share their timestamp with the one
    before): any order is as good, and a new one every epoch keeps a model from learning one by heart.
    """
    order = np.arange(len(data.user))
    coin = torch.rand(len(rows), generator=random).numpy()
    order[rows] = rows[np.lexsort((coin, data.time[rows], data.user[rows]))]
    return torch.from_numpy(order)


class RetrievalTask:
    """Next-item prediction: each user's last event is test, the one before it validation."""

    name: ClassVar[str] = "retrieval"
    metric: ClassVar[str] = "log likelihood"

    def __init__(self, encoded: Encoded, config: RetrievalConfig) -> None:
        self.encoded = encoded
        self.config = config
        data = encoded.data
        if data.lengths.max() < 4:
            raise DataSetError(
                "retrieval: no user has four events: two to train on, and one each for validation and test"
            )
        self.model = Retrieval(
            config, len(data.item_names), encoded.item_features, len(encoded.thresholds) + 1
        )
        self.description = {"head": self.name, "model": asdict(config), "data": encoded.description()}
        self.vocabulary = vars(encoded.vocabulary())
        self.training_users = np.arange(len(data.user_names))
        self.processes = OneProcess()
        self._training = np.flatnonzero(retrieval_split(data) == TRAIN)

    def batches(self, size: int, random: torch.Generator) -> Iterator[tuple[History, Tensor]]:
        """Histories and the next item of each event, in new order every time."""
        data, encoded, window = self.encoded.data, self.encoded, self.config.window
        order = shuffle_ties(data, self._training, random)
        # a long history gives its last window, or half of the time an earlier one
        ends = data.lengths - 2
        earlier = torch.rand(len(ends), 2, generator=random).numpy()
        cut = window + 1 + (earlier[:, 0] * np.maximum(ends - window, 0)).astype(np.int64)
        ends = np.where((ends > window + 1) & (earlier[:, 1] < 0.5), cut, ends)
        starts = np.maximum(ends - window - 1, 0)
        for batch in user_batches(len(self.training_users), size, random):
            users = self.training_users[batch]
            users = users[ends[users] >= 2]
            if len(users) == 0:
                continue
            rows, offsets = encoded.rows(users, ends[users] - 1, starts[users])
            history = History(encoded.items[order[rows]], encoded.levels[order[rows]], offsets)
            yield history, encoded.items[order[rows + 1]]

    def loss(self, batch: tuple[History, Tensor]) -> Tensor:
        return self.model.loss(*batch)

    @torch.inference_mode()
    def lists(
        self, model: Retrieval, users: Ids, ends: Ids, k: int = K, catalog: Catalog | None = None
    ) -> Iterator[tuple[Ids, Tensor, Tensor]]:
        """The best items after the users' first `ends` events, a batch of users at a time.

        Args:
            catalog: `model.catalog()`, where it is at hand.

        Yields:
            The users, and ids and probabilities `[users of the batch, k]`. What a user had in those events is
            not in the list; where the catalogue has no more, the id is -1.
        """
        catalog = model.catalog() if catalog is None else catalog
        for batch in user_batches(len(users), EVALUATION_USERS):
            history = self.encoded.history(users[batch], ends[batch], self.config.window)
            seen = self.encoded.seen(users[batch], ends[batch])
            scores, ids, lse = model.recommend(
                history, min(k, len(self.encoded.data.item_names)), seen, catalog
            )
            yield users[batch], _filled(ids, k, -1), _filled((scores - lse[:, None]).exp(), k, 0)

    def validate(self, model: nn.Module) -> dict[str, float]:
        users, ends = _held_out(self.encoded.data, 2)
        targets = self.encoded.items[torch.from_numpy(self.encoded.data.offsets[users] + ends)]
        lists = (ids for _, ids, _ in self.lists(model, users, ends))
        found = evaluate(lists, (targets, torch.arange(len(users) + 1)), (K,))
        return {
            **{name: found[name] for name in (f"hr@{K}", f"ndcg@{K}", f"mrr@{K}")},
            "log likelihood": self._log_likelihood(model, users, ends, targets),
        }

    @torch.inference_mode()
    def _log_likelihood(self, model: Retrieval, users: Ids, ends: Ids, targets: Tensor) -> float:
        """Mean of the held-out items: it counts every user, so it is less noisy than hits in a list."""
        losses = [
            model.next_loss(self.encoded.history(users[b], ends[b], self.config.window), targets[b])
            for b in user_batches(len(users), EVALUATION_USERS)
        ]
        return -torch.cat(losses).mean().item()

    def test(
        self,
        on_lists: OnLists = lambda users, ids, probabilities: None,
        catalog_dtype: CatalogDtype = "fp32",
    ) -> dict[str, float]:
        """Metrics on the last event of each user.

        Args:
            catalog_dtype: see `Catalog.pack`.
            on_lists: is called with the users of each batch and their lists, `max(KS)` items long: ids and
                probabilities.
        """
        users, ends = _held_out(self.encoded.data, 1)

        def lists() -> Iterator[Tensor]:
            catalog = self.model.catalog(catalog_dtype)
            for batch, ids, probabilities in self.lists(self.model, users, ends, max(KS), catalog):
                on_lists(batch, ids, probabilities)
                yield ids

        return self.encoded.list_metrics(lists(), users, ends)


def _held_out(data: Interactions, left: int) -> tuple[Ids, Ids]:
    """Users with an event before their last `left`, and how many events come before those."""
    users = np.flatnonzero(data.lengths > left)
    return users, data.lengths[users] - left


def _filled(lists: Tensor, k: int, value: float) -> Tensor:
    """Lists `[users, k]` also where the catalogue has fewer items."""
    return F.pad(lists, (0, k - lists.shape[1]), value=value)


def popularity(encoded: Encoded) -> dict[str, float]:
    """The baseline: the same lists, by how many events an item has, not counting each user's last."""
    data = encoded.data
    users, ends = _held_out(data, 1)
    counted = retrieval_split(data) != TEST
    counts = torch.from_numpy(np.bincount(data.item[counted], minlength=len(data.item_names))).float()
    longest = max(KS)
    lists = catalog_lists(
        torch.zeros(len(users), 8),
        torch.zeros(len(counts), 8),
        min(longest, len(counts)),
        exclude=encoded.seen(users, ends),
        bias=counts,
    )
    return encoded.list_metrics((_filled(ids, longest, -1) for ids in lists), users, ends)


@dataclass(frozen=True)
class RankingBatch:
    candidates: Candidates
    history: History
    levels: Tensor  # int64 [T_c], of the candidates
    rows: Tensor  # int64 [T_c], their events

    @property
    def users(self) -> int:
        return len(self.candidates.offsets) - 1

    def part(self, users: slice) -> RankingBatch:
        """Of some users in a row."""
        first, last = self.candidates.offsets[[users.start, users.stop]].tolist()
        return RankingBatch(
            self.candidates.part(users),
            self.history.part(users),
            self.levels[first:last],
            self.rows[first:last],
        )


class RankingTask:
    """Click prediction: of each user's events the last tenth is test, the tenth before it validation."""

    name: ClassVar[str] = "ranking"
    metric: ClassVar[str] = "auc"

    def __init__(self, encoded: Encoded, config: RankingConfig) -> None:
        self.encoded = encoded
        self.config = config
        data = encoded.data
        if data.lengths.max() < 10:
            raise DataSetError(
                "ranking: no user has ten events, of which one is for validation and one for test"
            )
        self._split = ranking_split(data)
        self.likes = data.rating >= LIKE
        self.statistics = Statistics(data, self.likes, self._split == TRAIN)
        self._before = self.statistics.before_events()
        self._click = encoded.thresholds.index(LIKE)  # the logit of a click
        self.model = Ranking(
            config,
            len(data.user_names),
            encoded.user_features,
            len(data.item_names),
            encoded.item_features,
            len(encoded.thresholds) + 1,
        )
        self.description = {"head": self.name, "model": asdict(config), "data": encoded.description()}
        self.vocabulary = vars(encoded.vocabulary())
        self.training_users = np.arange(len(data.user_names))
        self.processes = OneProcess()

    def batches(self, size: int, random: torch.Generator) -> Iterator[RankingBatch]:
        data = self.encoded.data
        order = shuffle_ties(data, np.flatnonzero(self._split == TRAIN), random)
        for users in user_batches(len(self.training_users), size, random):
            batch = self._impressions(self.training_users[users], TRAIN, order)
            if len(batch.rows):
                yield batch

    def loss(self, batch: RankingBatch) -> Tensor:
        """Binary cross-entropy of "the rating is at least this" for every level, the click's among them."""
        logits = self.model(batch.candidates, batch.history)
        reached = batch.levels[:, None] >= torch.arange(1, logits.shape[1] + 1)
        weights = torch.full((logits.shape[1],), self.config.level_weight)
        weights[self._click] = 1
        entropy = F.binary_cross_entropy_with_logits(logits, reached.float(), reduction="none")
        return (self.processes.mean(entropy) * weights).sum() / weights.sum()

    @torch.inference_mode()
    def judge(self, user: int, items: Ids) -> tuple[Tensor, Tensor]:
        """What a user thinks of items now, after all of its events.

        Returns:
            Click probabilities `[len(items)]`, and attention weights `[len(items), L, H]` over the events.
        """
        data = self.encoded.data
        history = self.encoded.history(np.array([user]), data.lengths[[user]])
        candidates = Candidates(
            users=torch.full((len(items),), user),
            items=torch.from_numpy(items),
            statistics=self.statistics.now(user, items),
            offsets=torch.tensor([0, len(items)]),
        )
        clicks = self.click_probability(self.model(candidates, history))
        weights, _ = self.model.weights(candidates, history)
        return clicks, weights.view(len(items), len(history.items), self.config.heads)

    @torch.inference_mode()
    def probabilities(self, model: Ranking, part: int, users: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The click probabilities of users' events of a part, and their rows: two `[events]`, in order."""
        asked = np.arange(len(self.encoded.data.user_names))[users]
        found, rows = [], []
        for of_batch in user_batches(len(asked), EVALUATION_USERS):
            batch = self._impressions(asked[of_batch], part)
            found.append(self.click_probability(model(batch.candidates, batch.history)))
            rows.append(batch.rows)
        return torch.cat(found), torch.cat(rows)

    def click_probability(self, logits: Tensor) -> Tensor:
        """Of the model's logits `[T_c, levels - 1]` the click's as a probability, `[T_c]`."""
        return logits[:, self._click].sigmoid()

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Each process on users of its own; torchmetrics puts together what they find."""
        own = self.processes.own(len(self.encoded.data.user_names))
        return self._metrics(*self.probabilities(model, VALID, own))

    def test(self) -> tuple[dict[str, float], Tensor, Tensor]:
        """Metrics on the test events, and their rows and probabilities."""
        probabilities, rows = self.probabilities(self.model, TEST)
        return self._metrics(probabilities, rows), rows, probabilities

    def _metrics(self, probabilities: Tensor, rows: Tensor) -> dict[str, float]:
        labels = torch.from_numpy(self.likes)[rows]
        users = torch.from_numpy(self.encoded.data.user)[rows]
        found = click_metrics(exact=True)  # all events are in memory anyway
        found.update(probabilities, labels, groups=users)
        return {name: value.item() for name, value in found.compute().items()}

    def _impressions(self, users: Ids, part: int, order: Tensor | None = None) -> RankingBatch:
        """The users' events of a part as candidates, each of which sees the events before it and no more."""
        data = self.encoded.data
        ends = data.lengths[users] - (data.lengths[users] // 10) * (TEST - part)
        places, offsets = self.encoded.rows(users, ends)
        events = places if order is None else order[places]
        asked = torch.from_numpy(self._split)[places] == part
        rows = events[asked]
        user = torch.repeat_interleave(torch.arange(len(users)), offsets.diff())[asked]
        candidates = Candidates(
            users=torch.from_numpy(users)[user],
            items=self.encoded.items[rows],
            statistics=self._before[rows],
            offsets=F.pad(torch.bincount(user, minlength=len(users)).cumsum(0), (1, 0)),
            visible=torch.from_numpy(data.position)[places[asked]],
        )
        history = History(self.encoded.items[events], self.encoded.levels[events], offsets)
        return RankingBatch(candidates, history, self.encoded.levels[rows], rows)


def restore(task: RetrievalTask | RankingTask, folder: Path) -> None:
    """Loads the weights of a finished or running training into the task's model.

    Raises:
        FileNotFoundError: nothing was trained there.
        CheckpointError: the weights are of another head, model or data set.
    """
    path = folder / task.name / "best.safetensors"
    tensors, saved = load_checkpoint(path)
    for key, value in task.description.items():
        if saved["description"].get(key) != value:
            raise CheckpointError(
                f"{path}: made with {key} = {saved['description'].get(key)}, this is {value}"
            )
    load_weights(path, task.model, tensors)
    task.model.eval()
