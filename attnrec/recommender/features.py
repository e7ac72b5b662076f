"""What a model knows of users and items: their columns, and statistics of what came before an event.

Columns are encoded by what the reader made of them: a `token` is a category, a `token_seq` a bag of
categories, a `float` or `float_seq` a dense vector (a text or image embedding, say).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .atomic import Column
from .data import Ids, Interactions


@dataclass(frozen=True)
class Categories:
    """Categories of each entity, jagged: `values[offsets[n] : offsets[n + 1]]`, numbers of words."""

    values: Tensor  # int64 [sum of counts]
    offsets: Tensor  # int64 [N + 1]
    words: list[str]

    def multi_hot(self) -> Tensor:
        """`[N, words]`, bool."""
        out = torch.zeros(len(self.offsets) - 1, len(self.words), dtype=torch.bool)
        rows = torch.repeat_interleave(torch.arange(len(out)), self.offsets.diff())
        out[rows, self.values] = True
        return out


@dataclass(frozen=True)
class Dense:
    """A vector of each entity, standardised; missing values are 0."""

    values: Tensor  # float32 [N, width]


Feature = Categories | Dense


def encode(column: Column) -> Feature:
    """A column of the reader as a feature.

    Raises:
        ValueError: vectors of different lengths (empty ones are missing values).
    """
    first = next((value for value in column if not isinstance(value, list) or value), "")
    if isinstance(first, float) or (isinstance(first, list) and isinstance(first[0], float)):
        return _dense(column)
    bags = [value if isinstance(value, list) else [value] * bool(value) for value in column]
    words = sorted({word for bag in bags for word in bag})
    number = {word: index for index, word in enumerate(words)}
    values = torch.tensor([number[word] for bag in bags for word in bag], dtype=torch.long)
    counts = torch.tensor([0] + [len(bag) for bag in bags])
    return Categories(values, counts.cumsum(0), words)


def _dense(column: Column) -> Dense:
    rows = [value if isinstance(value, list) else [value] for value in column]
    widths = {len(row) for row in rows if row}
    if len(widths) != 1:
        raise ValueError(f"vectors of one length wanted, got lengths {sorted(widths)}")
    width = widths.pop()
    values = torch.tensor([row or [math.nan] * width for row in rows], dtype=torch.float64)
    known = ~values.isnan()
    count = known.sum(0).clamp(min=1)
    values = values.nan_to_num(0)
    mean = values.sum(0) / count
    centred = (values - mean) * known
    deviation = (centred.square().sum(0) / count).sqrt()
    return Dense((centred / deviation.clamp(min=1e-6)).float())


STATISTICS = (
    "item events",
    "item mean rating",
    "item likes",
    "user events",
    "user mean rating",
    "user likes",
    "user recent likes",
)
RECENT = 15  # events of "user recent likes"


class Statistics:
    """What is known of user and item before an event, about unit scale; columns are `STATISTICS`.

    Of the user: everything earlier in the own history. Of the item: its events of all users with a smaller
    timestamp, among those that `counted [T]` allows (the training part). Ratings are taken against the mean
    of those, likes are 1 or -1, and means are drawn to 0 by a few imagined events.
    """

    def __init__(self, data: Interactions, likes: NDArray[np.bool_], counted: NDArray[np.bool_]) -> None:
        self._data = data
        self._middle = data.rating[counted].mean()
        opinions = self._opinions = self._opinions_of(data.rating, likes)
        states = [_user_states(opinions[data.history(user)]) for user in range(len(data.user_names))]
        self._user_states = np.concatenate(states)
        self._times = np.unique(data.time)
        moments = self._moment(data.item[counted], data.time[counted])
        order = np.argsort(moments)
        self._moments = moments[order]
        self._sums = _running_sum(opinions[counted][order])

    def before_events(self) -> Tensor:
        """`[T, S]`: just before each event."""
        data = self._data
        # a user's n events have n + 1 states, so each user shifts the rows by one
        states = self._user_states[np.arange(len(data.user)) + data.user]
        return self._columns(states, data.item, data.time)

    def now(
        self, user: int, items: Ids, later: tuple[NDArray[np.float32], NDArray[np.bool_]] | None = None
    ) -> Tensor:
        """`[len(items), S]`: after all events of the user, and `later` ones: their ratings and likes."""
        last = self._user_states[int(self._data.offsets[user + 1]) + user]
        if later is not None:
            events = (self._opinions[self._data.history(user)], self._opinions_of(*later))
            last = _user_states(np.concatenate(events))[-1]
        return self._columns(np.tile(last, (len(items), 1)), items, np.full(len(items), np.inf))

    def _opinions_of(self, rating: NDArray[np.float32], likes: NDArray[np.bool_]) -> NDArray[np.float64]:
        return np.stack((rating - self._middle, np.where(likes, 1.0, -1.0)), axis=1)

    def _columns(self, states: NDArray[np.float64], items: Ids, times: NDArray[np.float64]) -> Tensor:
        first = np.searchsorted(self._moments, self._moment(items, np.full(len(items), -np.inf)))
        end = np.searchsorted(self._moments, self._moment(items, times))
        events = (end - first)[:, None]
        means = (self._sums[end] - self._sums[first]) / (events + 5)
        columns = np.concatenate((np.log1p(events) / 5, means, states), axis=1)
        return torch.from_numpy(columns.astype(np.float32))

    def _moment(self, items: Ids, times: NDArray[np.float64]) -> Ids:
        """A number that orders (item, time)."""
        return items * (len(self._times) + 1) + np.searchsorted(self._times, times)


def _user_states(opinions: NDArray[np.float64]) -> NDArray[np.float64]:
    """A user's statistics after 0, 1, ... n of its events, `[n + 1, 4]`, from the opinions `[n, 2]`."""
    sums = _running_sum(opinions)
    count = np.arange(len(sums))[:, None]
    earlier = np.maximum(count - RECENT, 0)
    recent = (sums[:, 1:] - sums[earlier[:, 0], 1:]) / (count - earlier + 3)
    return np.concatenate((np.log1p(count) / 5, sums / (count + 3), recent), axis=1)


def _running_sum(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums of the first 0, 1, ... n rows, `[n + 1, columns]`."""
    return np.concatenate((np.zeros((1, rows.shape[1])), np.cumsum(rows, axis=0)))
