"""A made-up data set of a few users in RecBole's format, with something to learn for both heads.

Likes follow a hidden taste in genres, and each item is followed by the one with the next number.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

GENRES = ("Action", "Comedy", "Drama", "Horror")


def write(folder: Path, users: int = 24, items: int = 40, seed: int = 0) -> Path:
    """Writes tiny.inter, tiny.item and tiny.user; rows in no order, some with one timestamp."""
    random = np.random.default_rng(seed)
    genre = random.integers(len(GENRES), size=items)
    taste = random.integers(len(GENRES), size=users)
    events = []
    for user in range(users):
        count = int(random.integers(20, items - 10))
        times = 1000 * user + np.sort(random.integers(0, 2 * count, size=count))
        for item, time in zip((int(random.integers(items)) + np.arange(count)) % items, times, strict=True):
            rating = random.choice((4, 5)) if genre[item] == taste[user] else random.choice((1, 2, 3))
            events.append(f"u{user}\ti{item}\t{rating}\t{time}")
    random.shuffle(events)
    folder.mkdir(parents=True, exist_ok=True)
    _lines(folder / "tiny.inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float", events)
    _lines(
        folder / "tiny.item",
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq",
        [f"i{i}\tTitle {i}\t{1990 + i % 7}\t{GENRES[genre[i]]}{' Classic' * (i % 2)}" for i in range(items)],
    )
    _lines(
        folder / "tiny.user",
        "user_id:token\tage:token\tgender:token\toccupation:token",
        [f"u{u}\t{20 + u % 5}\t{'MF'[u % 2]}\tother" for u in range(users)],
    )
    return folder


def _lines(path: Path, header: str, rows: list[str]) -> None:
    path.write_text("\n".join((header, *rows)) + "\n")
