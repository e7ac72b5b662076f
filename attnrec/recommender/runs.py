"""Trainings as a person runs them: settings good for MovieLens-100k, progress on the screen, logs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .model import CatalogDtype, RankingConfig, RetrievalConfig
from .tasks import Encoded, RankingTask, RetrievalTask, popularity
from .train import TrainConfig, fit


class MissingExtraError(ImportError):
    """A package that an optional part needs is not installed."""


HEADS = ("retrieval", "ranking")
# chosen by the validation events (docs/recommender.md)
SETTINGS: dict[str, TrainConfig] = {
    "retrieval": TrainConfig(epochs=26, patience=5, batch_users=8, learning_rate=1e-3),
    "ranking": TrainConfig(
        epochs=15, batch_users=4, learning_rate=2e-3, weight_decay=1e-4, embedding_decay=1e-4
    ),
}


def make_task(head: str, encoded: Encoded) -> RetrievalTask | RankingTask:
    if head == "retrieval":
        return RetrievalTask(encoded, RetrievalConfig())
    return RankingTask(encoded, RankingConfig())


@contextlib.contextmanager
def connected() -> Iterator[bool]:
    """In the block this process is connected to the others where torchrun started some; says whether."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield False
        return
    # here: what it imports of torch.distributed takes half as long as torch itself
    from . import distributed

    with distributed.connected():
        yield True


def train_head(
    head: str,
    encoded: Encoded,
    folder: Path,
    console: Console,
    *,
    resume: bool = False,
    tensorboard: bool = False,
    prepare: Callable[[RetrievalTask | RankingTask], None] = lambda task: None,
    **changes: Any,
) -> tuple[RetrievalTask | RankingTask, list[dict[str, float]]]:
    """Trains a head into `folder/<head>` and returns it with the best weights, and the rows of its epochs.

    Under torchrun the processes train the head together, and the first one prints and writes.

    Args:
        resume, changes: see `train.fit`; settings of `TrainConfig` other than the head's own.
        tensorboard: write the epochs' metrics for TensorBoard, too (needs the extra `tensorboard`).
        prepare: is called with the task before it is trained.
    """
    config = replace(SETTINGS[head], **changes)
    torch.manual_seed(config.seed)  # the weights at the start
    task = make_task(head, encoded)
    prepare(task)
    folder = folder / head
    with contextlib.ExitStack() as stack:
        if stack.enter_context(connected()):
            from .distributed import together

            stack.enter_context(together(task, folder.parent))
            console.quiet = dist.get_rank() > 0
            tensorboard = tensorboard and not console.quiet
        progress = stack.enter_context(_progress(console))
        log = stack.enter_context(_tensorboard_log(folder)) if tensorboard else None
        bar = progress.add_task(f"{head} epoch 1", total=None)

        def on_step(step: int, steps: int) -> None:
            progress.update(bar, completed=step, total=steps)

        def on_epoch(row: dict[str, float]) -> None:
            epoch = int(row["epoch"]) + 1
            shown = "  ".join(f"{name} {value:.4f}" for name, value in row.items() if name != "epoch")
            console.print(f"{head} epoch {epoch:2}  {shown}", highlight=False, soft_wrap=True)
            progress.update(bar, description=f"{head} epoch {epoch + 1}", completed=0)
            if log is not None:
                for name, value in row.items():
                    log.add_scalar(f"{head}/{name}", value, epoch)

        rows = fit(task, config, folder, resume=resume, on_step=on_step, on_epoch=on_epoch)
    return task, rows


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


@contextlib.contextmanager
def _tensorboard_log(folder: Path) -> Iterator[Any]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError(
            f"TensorBoard logs need the extra: pip install 'attnrec[tensorboard]' ({error})"
        ) from error
    with SummaryWriter(folder / "tensorboard") as writer:
        yield writer


def evaluate(
    encoded: Encoded,
    retrieval: RetrievalTask,
    ranking: RankingTask,
    catalog_dtype: CatalogDtype = "fp32",
) -> dict[str, Any]:
    """The metrics of both heads and of the popularity baseline on the test events."""
    return {
        "retrieval": retrieval.test(catalog_dtype=catalog_dtype),
        "popularity": popularity(encoded),
        "ranking": ranking.test()[0],
    }


def metrics_table(metrics: dict[str, Any]) -> Group:
    """What `evaluate` found, for the console."""
    header, rows = list_rows(metrics)
    # a head and its lengths in lines of their own, and no frame: 80 columns hold it
    lists = Table(*(name.replace(" ", "\n") for name in header), box=box.SIMPLE_HEAD, padding=0)
    for row in rows:
        lists.add_row(*row)
    ranking = Table("ranking", "value", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, value in metrics["ranking"].items():
        ranking.add_row(name, f"{value:.4f}")
    return Group(lists, ranking)


def list_rows(metrics: dict[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Header and rows of the metrics of lists: a row a metric, a column a head and length of the list."""
    heads = ("retrieval", "popularity")
    parts = [name.split("@") for name in metrics["retrieval"]]
    names, lengths = (list(dict.fromkeys(column)) for column in zip(*parts, strict=True))
    header = ["metric", *(f"{head} @{k}" for head in heads for k in lengths)]
    rows = [
        (name, *(f"{metrics[head][f'{name}@{k}']:.4f}" for head in heads for k in lengths)) for name in names
    ]
    return header, rows
