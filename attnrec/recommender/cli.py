"""The command line: `python -m attnrec.recommender {data,train,update,evaluate,recommend,explain}`."""

from __future__ import annotations

import argparse
import json
import math
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import runs
from .atomic import DataSetError
from .checkpoint import CheckpointError, write_file
from .data import Interactions, UnknownNameError, load
from .movielens import LICENSE, DataError, movielens_100k
from .serve import Recommender, load_heads
from .tasks import Encoded, encode_data
from .update import EPOCHS, update_head

MOVIELENS = "movielens-100k"
DEFAULT_RUN = Path("runs") / MOVIELENS
# what the user can mend; anything else is a bug and keeps its traceback
MENDABLE = (
    CheckpointError,
    DataError,
    DataSetError,
    FileNotFoundError,
    UnknownNameError,
    runs.MissingExtraError,
)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; 0, or 1 after an error that the user can mend, which is printed."""
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        options.command(options, console)
    except MENDABLE as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m attnrec.recommender",
        description="A thin recommender on attnrec: next items for a user, how likely each is liked, why.",
        epilog="Start with `data`, then `train`; `recommend` and `explain` use what was trained. "
        "`python -m attnrec.recommender.demo` does everything once.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    data = commands.add_parser(
        "data",
        help="get MovieLens-100k, or check a folder of your own",
        description="Gets MovieLens-100k into the cache, or reads a folder with RecBole's atomic files "
        "(one .inter, and a .item and a .user where there are), and says what is in it.",
    )
    data.add_argument("source", nargs="?", default=MOVIELENS, help=f"{MOVIELENS} (default) or a folder")
    data.set_defaults(command=_data)

    train = commands.add_parser(
        "train",
        help="train one head or both",
        description="Trains; every epoch leaves a checkpoint to go on from.",
    )
    _places(train)
    train.add_argument("--head", choices=("retrieval", "ranking", "both"), default="both")
    train.add_argument("--epochs", type=positive, help="at most so many (default: the head's own setting)")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument(
        "--resume", action="store_true", help="go on from the last epoch of a run that was stopped"
    )
    train.add_argument(
        "--tensorboard", action="store_true", help="write TensorBoard logs into the run folder"
    )
    train.set_defaults(command=_train)

    update = commands.add_parser(
        "update",
        help="learn from a data set that has grown",
        description="Goes on from the weights of a run, on the users who have more events now. Users, items "
        "and categories go by name; new ones are learnt.",
    )
    _places(update)
    update.add_argument("--head", choices=(*runs.HEADS, "both"), default="both")
    update.add_argument(
        "--epochs", type=positive, default=EPOCHS, help=f"at most so many (default: {EPOCHS})"
    )
    update.add_argument("--seed", type=int, default=0)
    update.set_defaults(command=_update)

    evaluate = commands.add_parser(
        "evaluate",
        help="measure both heads on the test events",
        description="Prints and writes metrics.json.",
    )
    _places(evaluate)
    _catalog_dtype(evaluate)
    evaluate.set_defaults(command=_evaluate)

    recommend = commands.add_parser(
        "recommend",
        help="a list for a user",
        description="The items that a user most likely comes to next, without those that the user has had. "
        "`next` is the probability among all of them, `liked` that the user would rate it 4 or more.",
    )
    _places(recommend)
    _catalog_dtype(recommend)
    recommend.add_argument("--user", required=True, help="the user's id in the data set")
    recommend.add_argument(
        "--event",
        action="append",
        default=[],
        metavar="ITEM=RATING",
        help="something that happened since, after the events of the data set; may be repeated, in order",
    )
    recommend.add_argument("--k", type=positive, default=10, help="length of the list (default: 10)")
    recommend.set_defaults(command=_recommend)

    explain = commands.add_parser(
        "explain",
        help="why an item is liked or not",
        description="Draws the attention weights of the user's events in every head and names the heaviest.",
    )
    _places(explain)
    explain.add_argument("--user", required=True, help="the user's id in the data set")
    explain.add_argument("--item", required=True, help="the item's id in the data set")
    explain.add_argument("--top", type=positive, default=10, help="how many events to name (default: 10)")
    explain.add_argument("--out", type=Path, help="the PNG (default: heatmap.png in the run folder)")
    explain.set_defaults(command=_explain)
    return parser


def _places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", default=MOVIELENS, help=f"{MOVIELENS} (default) or a folder of atomic files"
    )
    parser.add_argument("--run", type=Path, default=DEFAULT_RUN, help=f"run folder (default: {DEFAULT_RUN})")


def _catalog_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--catalog-dtype",
        choices=("fp32", "bf16", "int8"),
        default="fp32",
        help="of what a search of the catalogue reads first; the lists are the same (default: fp32)",
    )


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _load(source: str) -> Interactions:
    return load(movielens_100k() if source == MOVIELENS else Path(source))


def _encoded(options: argparse.Namespace) -> Encoded:
    return encode_data(_load(options.data))


def _data(options: argparse.Namespace, console: Console) -> None:
    folder = movielens_100k() if options.source == MOVIELENS else Path(options.source)
    data = load(folder)
    table = Table("what", "value", title=str(folder), show_header=False)
    table.add_row("events", f"{len(data.user):,}")
    table.add_row("users", f"{len(data.user_names):,}")
    table.add_row("items", f"{len(data.item_names):,}")
    table.add_row(
        "history",
        f"{data.lengths.min()} to {data.lengths.max()} events, {data.lengths.mean():.1f} on average",
    )
    first, last = (datetime.fromtimestamp(t, UTC).date() for t in (data.time.min(), data.time.max()))
    table.add_row("time", f"{first} to {last}")
    table.add_row("user features", ", ".join(data.user_columns) or "none")
    table.add_row("item features", ", ".join(data.item_columns) or "none")
    console.print(table)
    if options.source == MOVIELENS:
        console.print(LICENSE, highlight=False)


def _train(options: argparse.Namespace, console: Console) -> None:
    encoded = _encoded(options)
    changes = {"seed": options.seed} | ({} if options.epochs is None else {"epochs": options.epochs})
    with runs.connected():
        for head in runs.HEADS if options.head == "both" else (options.head,):
            runs.train_head(
                head,
                encoded,
                options.run,
                console,
                resume=options.resume,
                tensorboard=options.tensorboard,
                **changes,
            )
    console.print(f"checkpoints are in {options.run}")


def _update(options: argparse.Namespace, console: Console) -> None:
    encoded = _encoded(options)
    with runs.connected():
        for head in runs.HEADS if options.head == "both" else (options.head,):
            update_head(head, encoded, options.run, console, epochs=options.epochs, seed=options.seed)
    console.print(f"checkpoints are in {options.run}")


def _evaluate(options: argparse.Namespace, console: Console) -> None:
    from . import report

    encoded = _encoded(options)
    heads = load_heads(encoded, options.run)
    found = runs.evaluate(encoded, *heads, catalog_dtype=options.catalog_dtype)
    console.print(runs.metrics_table(found))
    found["environment"] = report.environment()
    write_file(options.run / "metrics.json", json.dumps(found, indent=2).encode())


def _recommend(options: argparse.Namespace, console: Console) -> None:
    recommender = Recommender.load(_encoded(options), options.run, options.catalog_dtype)
    data = recommender.encoded.data
    session = recommender.follow(data.user_id(options.user))
    for event in options.event:
        session.add(*_event(data, event))
    table = Table("rank", "item", "title", "next", "liked", title=f"user {options.user}")
    for rank, row in enumerate(session.recommend(options.k), start=1):
        table.add_row(
            str(rank),
            data.item_names[row.item],
            data.titles[row.item],
            f"{row.probability:.4f}",
            f"{row.click:.2f}",
        )
    console.print(table)


def _event(data: Interactions, text: str) -> tuple[int, float]:
    name, _, rating = text.rpartition("=")
    try:
        number = float(rating)
    except ValueError:
        number = math.nan
    if not name or not math.isfinite(number):
        raise DataSetError(f"event {text!r}: want ITEM=RATING, such as {data.item_names[0]}=4")
    return data.item_id(name), number


def _explain(options: argparse.Namespace, console: Console) -> None:
    from . import report

    recommender = Recommender.load(_encoded(options), options.run)
    data = recommender.encoded.data
    explanation = recommender.explain(data.user_id(options.user), data.item_id(options.item))
    heads = [f"head {head + 1}" for head in range(explanation.weights.shape[1])]
    table = Table(
        "event",
        "title",
        "rating",
        "mean",
        *heads,
        title=f"user {options.user}, {data.titles[explanation.item]}: liked {explanation.click:.2f}",
    )
    for place in explanation.heaviest(options.top):
        row = explanation.events[place]
        weights = explanation.weights[place]
        table.add_row(
            str(place + 1),
            data.titles[data.item[row]],
            f"{data.rating[row]:g}",
            *(f"{weight:.3f}" for weight in (weights.mean(), *weights)),
        )
    console.print(table)
    out = options.out or options.run / "heatmap.png"
    report.heat_map(out, data, explanation)
    console.print(f"heat map: {out}")
