"""Interactions on their way from atomic files to arrays: one jagged history for each user, in order of time.

The splits are the protocol of `docs/recommender.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .atomic import Column, DataSetError, read_atomic

Ids = NDArray[np.int64]
TRAIN, VALID, TEST = 0, 1, 2


class UnknownNameError(LookupError):
    """No user or item has this raw id."""


@dataclass(frozen=True)
class Fields:
    """The names of the columns that mean something."""

    user: str = "user_id"
    item: str = "item_id"
    rating: str = "rating"
    time: str = "timestamp"
    title: str = "movie_title"
    item_features: tuple[str, ...] = ("release_year", "class", "movie_title")
    user_features: tuple[str, ...] = ("age", "gender", "occupation")


@dataclass(frozen=True)
class Interactions:
    """Events user by user, each user's in order of (timestamp, row number of the file). `T` events.

    User and item ids are numbers from 0: the row of the `.user` and `.item` file. `user_names` and
    `item_names` have the raw ids.
    """

    user: Ids  # [T]
    item: Ids  # [T]
    rating: NDArray[np.float32]  # [T]
    time: NDArray[np.float64]  # [T]
    offsets: Ids  # [users + 1]: user u's events are offsets[u] ... offsets[u + 1] - 1
    user_names: list[str]
    item_names: list[str]
    titles: list[str]
    user_columns: dict[str, Column]  # features, one value a user
    item_columns: dict[str, Column]  # features, one value an item

    @property
    def lengths(self) -> Ids:
        """Events of each user, `[users]`."""
        return np.diff(self.offsets)

    @property
    def position(self) -> Ids:
        """Each event's place in its user's history, from 0, `[T]`: so many events came before it."""
        return np.arange(len(self.user)) - self.offsets[self.user]

    def history(self, user: int) -> slice:
        """Where a user's events are."""
        return slice(int(self.offsets[user]), int(self.offsets[user + 1]))

    def user_id(self, name: str) -> int:
        return _look_up(self.user_names, name, "user")

    def item_id(self, name: str) -> int:
        return _look_up(self.item_names, name, "item")


def _look_up(names: list[str], name: str, what: str) -> int:
    try:
        return names.index(name)
    except ValueError:
        raise UnknownNameError(
            f"no {what} {name!r}; known are {len(names)}, such as {', '.join(names[:3])}"
        ) from None


def load(folder: str | Path, fields: Fields | None = None) -> Interactions:
    """Reads `*.inter`, and `*.item` and `*.user` where they are, from a folder.

    Raises:
        FileNotFoundError: the folder has not exactly one `.inter` file.
        AtomicFileError: a malformed row, by file and line.
        DataSetError: a column is missing or of another type, there are no events, an event lacks its user,
            item, rating or time, or the files do not fit together.
    """
    fields = fields or Fields()
    folder = Path(folder)
    path = _only(folder, "inter")
    events = read_atomic(path)
    kinds = {fields.user: "token", fields.item: "token", fields.rating: "float", fields.time: "float"}
    for name, kind in kinds.items():
        if name not in events:
            raise DataSetError(f"{path}: no column {name}, only {', '.join(events)}")
        if not events[name]:
            raise DataSetError(f"{path}: no events")
        if not isinstance(events[name][0], str if kind == "token" else float):
            raise DataSetError(f"{path}: column {name} must be of type {kind}")
    rating, time = (np.asarray(events[name], dtype=np.float64) for name in (fields.rating, fields.time))
    empty = (x == "" for x in (np.asarray(events[fields.user]), np.asarray(events[fields.item])))
    missing = np.logical_or.reduce([*empty, np.isnan(rating), np.isnan(time)])
    if missing.any():
        raise DataSetError(f"{path}:{int(missing.argmax()) + 2}: an event without user, item, rating or time")

    user_names, user_columns = _entities(folder, "user", fields.user, events[fields.user])
    item_names, item_columns = _entities(folder, "item", fields.item, events[fields.item])
    user, item = _numbers(user_names, events[fields.user]), _numbers(item_names, events[fields.item])
    # lexsort is stable: equal times stay in the file's order
    order = np.lexsort((time, user))
    counts = np.bincount(user, minlength=len(user_names))
    titles = item_columns.get(fields.title)
    return Interactions(
        user=user[order],
        item=item[order],
        rating=rating[order].astype(np.float32),
        time=time[order],
        offsets=np.concatenate(([0], np.cumsum(counts))),
        user_names=user_names,
        item_names=item_names,
        titles=item_names if titles is None else [_words(title) for title in titles],
        user_columns={name: user_columns[name] for name in fields.user_features if name in user_columns},
        item_columns={name: item_columns[name] for name in fields.item_features if name in item_columns},
    )


def _only(folder: Path, extension: str) -> Path:
    found = sorted(folder.glob(f"*.{extension}"))
    if len(found) != 1:
        raise FileNotFoundError(f"{folder}: want one .{extension} file, found {len(found)}")
    return found[0]


def _entities(folder: Path, kind: str, key: str, used: Column) -> tuple[list[str], dict[str, Column]]:
    """Raw ids and columns of the users or items: those of the file, or without one those of the events."""
    if not any(folder.glob(f"*.{kind}")):
        return sorted(set(used), key=lambda name: (len(name), name)), {}
    path = _only(folder, kind)
    columns = read_atomic(path)
    if key not in columns:
        raise DataSetError(f"{path}: no column {key}, only {', '.join(columns)}")
    names = columns[key]
    if len(set(names)) != len(names):
        raise DataSetError(f"{path}: a {kind} is there twice")
    unknown = set(used) - set(names)
    if unknown:
        raise DataSetError(
            f"{path}: {len(unknown)} {kind}s of the events are not there, such as {min(unknown)}"
        )
    return names, columns


def _numbers(names: list[str], used: Column) -> Ids:
    number = {name: index for index, name in enumerate(names)}
    return np.fromiter((number[name] for name in used), dtype=np.int64, count=len(used))


def _words(title: str | list[str]) -> str:
    return title if isinstance(title, str) else " ".join(title)


def retrieval_split(data: Interactions) -> NDArray[np.int64]:
    """Each user's last event is test, the one before it validation, everything before training. `[T]`"""
    left = data.lengths[data.user] - data.position
    return np.where(left == 1, TEST, np.where(left == 2, VALID, TRAIN))


def ranking_split(data: Interactions) -> NDArray[np.int64]:
    """Of a user's n events the last floor(n / 10) are test, as many before them validation. `[T]`"""
    tenth = (data.lengths // 10)[data.user]
    left = data.lengths[data.user] - data.position
    return np.where(left <= tenth, TEST, np.where(left <= 2 * tenth, VALID, TRAIN))
