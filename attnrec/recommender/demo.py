"""Everything once, on MovieLens-100k: trains and measures both heads, writes lists, a heat map, a report.

`python -m attnrec.recommender.demo --out runs/demo`, or `make demo`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import Tensor

from . import report, runs
from .checkpoint import CheckpointError, write_file
from .cli import MENDABLE, positive
from .data import Interactions, load
from .movielens import movielens_100k
from .serve import Recommender
from .tasks import Encoded, K, RankingTask, RetrievalTask, encode_data, popularity


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m attnrec.recommender.demo",
        description=f"{__doc__.splitlines()[0]} What was trained before is used again.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs") / "demo", help="folder (default: runs/demo)")
    parser.add_argument("--data", type=Path, help="folder with atomic files in place of MovieLens-100k")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=positive, help="at most so many (default: each head's own setting)")
    parser.add_argument("--fresh", action="store_true", help="train again, whatever is in the folder")
    options = parser.parse_args(arguments)
    changes = {} if options.epochs is None else {"epochs": options.epochs}
    console = Console()
    try:
        folder = options.data or movielens_100k()
        run(folder, options.out, console, resume=not options.fresh, seed=options.seed, **changes)
    except MENDABLE as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        return 1
    return 0


def run(folder: Path, out: Path, console: Console, **training: Any) -> None:
    """The demo from the files in `folder` to the ones in `out`; `training` as in `runs.train_head`."""
    started = time.perf_counter()
    data = load(folder)
    encoded = encode_data(data)
    console.print(
        f"{len(data.user):,} events of {len(data.user_names):,} users, {len(data.item_names):,} items"
    )
    seconds = time.perf_counter() - started
    retrieval, retrieval_rows = _train("retrieval", encoded, out, console, **training)
    ranking, ranking_rows = _train("ranking", encoded, out, console, **training)
    assert isinstance(retrieval, RetrievalTask)
    assert isinstance(ranking, RankingTask)
    # epochs of an earlier run count with the time they took then
    seconds += sum(row["seconds"] for row in retrieval_rows + ranking_rows)
    started = time.perf_counter()

    listed: list[tuple[np.ndarray, Tensor, Tensor]] = []
    found_lists = retrieval.test(lambda *batch: listed.append(batch))
    users, ids, probabilities = (np.concatenate(column) for column in zip(*listed, strict=True))
    found_clicks, rows, clicks = ranking.test()
    report.write_csv(
        out / "recommendations.csv",
        ["user", "rank", "item", "title", "probability"],
        _lists(data, users, ids[:, :K], probabilities[:, :K]),
    )
    report.write_csv(
        out / "ranking.csv",
        ["user", "item", "label", "probability"],
        _clicks(data, ranking, rows.numpy(), clicks.numpy()),
    )
    recommender = Recommender(encoded, retrieval, ranking)
    shown = users[[0, len(users) // 2, -1]].tolist()
    first = recommender.recommend(shown[0], 1)[0].item
    report.heat_map(out / "heatmap.png", data, recommender.explain(shown[0], first))
    metrics = {
        "retrieval": found_lists,
        "popularity": popularity(encoded),
        "ranking": found_clicks,
        "seconds": round(seconds + time.perf_counter() - started, 1),
        "environment": report.environment(),
    }
    write_file(out / "metrics.json", json.dumps(metrics, indent=2).encode())
    write_file(out / "report.html", report.page(metrics, recommender, shown).encode())
    console.print(runs.metrics_table(metrics))
    console.print(f"{metrics['seconds']} s; see {out / 'report.html'}")


def _train(head: str, encoded: Encoded, out: Path, console: Console, **training: Any) -> Any:
    """`runs.train_head`, from the start where what is in the folder is of other settings or data."""
    try:
        return runs.train_head(head, encoded, out, console, **training)
    except CheckpointError as error:
        console.print(f"training {head} afresh: {error}", markup=False, highlight=False)
        return runs.train_head(head, encoded, out, console, **{**training, "resume": False})


def _lists(
    data: Interactions, users: np.ndarray, ids: np.ndarray, probabilities: np.ndarray
) -> Iterator[tuple[str, int, str, str, str]]:
    """Rows of recommendations.csv: of the lists that the retrieval metrics measure the first K items."""
    for user, items, chances in zip(users, ids, probabilities, strict=True):
        for rank, (item, chance) in enumerate(zip(items, chances, strict=True), start=1):
            if item >= 0:
                yield data.user_names[user], rank, data.item_names[item], data.titles[item], f"{chance:.9g}"


def _clicks(
    data: Interactions, ranking: RankingTask, rows: np.ndarray, probabilities: np.ndarray
) -> Iterator[tuple[str, str, int, str]]:
    """Rows of ranking.csv: one for each test event."""
    for row, chance in zip(rows, probabilities, strict=True):
        yield (
            data.user_names[data.user[row]],
            data.item_names[data.item[row]],
            int(ranking.likes[row]),
            f"{chance:.9g}",
        )


if __name__ == "__main__":
    raise SystemExit(main())
