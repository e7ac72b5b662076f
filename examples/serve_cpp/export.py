"""Exports a trained ranking head for a C++ server: an AOTInductor package, and a batch to try it with.

    python examples/serve_cpp/export.py --run runs/demo

writes `ranking.pt2` and `batch.pt` into build/serve_cpp, which serve.cpp reads. This is the only step that
needs Python, and a C++ compiler for what torch fuses between attnrec's ops.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as fx_config

from attnrec.recommender.cli import MENDABLE
from attnrec.recommender.data import Ids, load
from attnrec.recommender.features import STATISTICS
from attnrec.recommender.model import Candidates, History, RankingConfig
from attnrec.recommender.movielens import movielens_100k
from attnrec.recommender.tasks import RankingTask, encode_data, restore

# What the server takes, in order: dtype and shape. A word is a size that is another one in each batch. The
# package tells the same, and how large ids may be, to serve.cpp, which checks a batch before it is used.
INPUTS = {
    "users": (torch.int64, ("candidates",)),  # of each candidate
    "items": (torch.int64, ("candidates",)),
    "statistics": (torch.float32, ("candidates", len(STATISTICS))),  # see features.Statistics
    "offsets": (torch.int64, ("bounds",)),  # user b's candidates are offsets[b] ... offsets[b + 1] - 1
    "events": (torch.int64, ("events",)),  # the items of the histories
    "levels": (torch.int64, ("events",)),  # and their ratings
    "event_offsets": (torch.int64, ("bounds",)),
}


class _Rows(nn.Module):
    """In place of an encoder: what it gave, `[N, E]`."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows)

    def forward(self) -> Tensor:
        return self.rows


class Clicks(nn.Module):
    """The head from ids to click probabilities `[T_c]`, with all items and users encoded once and for all."""

    def __init__(self, task: RankingTask) -> None:
        super().__init__()
        self.model = copy.deepcopy(task.model).eval().requires_grad_(False)
        self.model.items, self.model.users = _Rows(self.model.items()), _Rows(self.model.users())
        self.click_probability = task.click_probability

    def forward(
        self,
        users: Tensor,
        items: Tensor,
        statistics: Tensor,
        offsets: Tensor,
        events: Tensor,
        levels: Tensor,
        event_offsets: Tensor,
    ) -> Tensor:
        candidates = Candidates(users, items, statistics, offsets)
        return self.click_probability(self.model(candidates, History(events, levels, event_offsets)))


def make_batch(task: RankingTask, users: Ids, items: Sequence[Ids]) -> dict[str, Tensor]:
    """The inputs that rank `items[b]` for `users[b]`, after all of their events."""
    data = task.encoded.data
    history = task.encoded.history(users, data.lengths[users])
    counts = torch.tensor([0, *map(len, items)])
    return {
        "users": torch.from_numpy(users).repeat_interleave(counts[1:]),
        "items": torch.from_numpy(np.concatenate(items)),
        "statistics": torch.cat([task.statistics.now(*asked) for asked in zip(users, items, strict=True)]),
        "offsets": counts.cumsum(0),
        "events": history.items,
        "levels": history.levels,
        "event_offsets": history.offsets,
    }


def export(task: RankingTask, batch: dict[str, Tensor], package: Path) -> None:
    """Writes the package; `batch` is an example, of at least two users, candidates and events."""
    sizes = {name: torch.export.Dim(name) for name in ("candidates", "events", "bounds")}
    shapes = [
        {i: sizes[size] for i, size in enumerate(shape) if size in sizes} for _, shape in INPUTS.values()
    ]
    model, levels = task.model, len(task.encoded.thresholds) + 1
    below = {"users": len(model.user_bias), "items": len(model.item_bias)}
    below |= {"events": below["items"], "levels": levels}
    described = [
        " ".join([name, str(dtype).removeprefix("torch."), *map(str, shape)])
        + (f" below {below[name]}" if name in below else "")
        for name, (dtype, shape) in INPUTS.items()
    ]
    with fx_config.patch(backed_size_oblivious=True):  # also one user, one candidate, or none
        program = torch.export.export(
            Clicks(task), tuple(batch[name] for name in INPUTS), dynamic_shapes=tuple(shapes)
        )
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(package),
            inductor_configs={"aot_inductor.metadata": {"inputs": "\n".join(described)}},
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of atomic files (default: MovieLens-100k)")
    parser.add_argument(
        "--run", type=Path, default=Path("runs/demo"), help="what `make demo` or `train` left"
    )
    parser.add_argument("--out", type=Path, default=Path("build/serve_cpp"))
    parser.add_argument("--users", type=int, default=3, help="of the batch, the first of the data set")
    parser.add_argument("--candidates", type=int, default=10, help="of each user, drawn at random")
    options = parser.parse_args(arguments)
    try:
        task = RankingTask(encode_data(load(options.data or movielens_100k())), RankingConfig())
        restore(task, options.run)
    except MENDABLE as error:
        parser.error(str(error))
    random = np.random.default_rng(0)
    count = len(task.encoded.data.item_names)
    items = [random.choice(count, options.candidates, replace=False) for _ in range(options.users)]
    batch = make_batch(task, np.arange(options.users), items)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.save(batch, options.out / "batch.pt")
    export(task, batch, options.out / "ranking.pt2")
    print(f"{options.out}: ranking.pt2, batch.pt")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
