"""One process of test_sharded_training.py, started by torchrun with FOLDER, the data set in `tiny`, and HEAD.

Writes `gradients.<head>.<rank>` (empty, or the traceback) and `rows.<head>.<rank>`, the epochs of a training
without dropout; trains a run into `whole`, and the same into `killed`, where the last process kills itself
after the first epoch.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
import traceback
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from attnrec.recommender import data, runs
from attnrec.recommender.distributed import together
from attnrec.recommender.model import RankingConfig, RetrievalConfig
from attnrec.recommender.tasks import RankingTask, RetrievalTask, encode_data
from attnrec.recommender.train import fit

EPOCHS = 3
RANK = int(os.environ.get("RANK", "0"))


def task_without_dropout(head, encoded):
    torch.manual_seed(0)
    if head == "retrieval":
        return RetrievalTask(encoded, RetrievalConfig(dim=16, window=12, dropout=0.0))
    return RankingTask(encoded, RankingConfig(dim=32, layers=1, dropout=0.0))


def rows_without_dropout(task, folder):
    """Of an epoch's row all that does not depend on the clock."""
    rows = fit(task, replace(runs.SETTINGS[task.name], epochs=EPOCHS), folder / task.name)
    return [{name: x for name, x in row.items() if name != "seconds"} for row in rows]


def gradients(head, encoded, folder) -> None:
    """Of the first batches, those of one process; also where there are fewer users than processes."""
    for users in (8, 1):
        alone = task_without_dropout(head, encoded)
        batch = next(alone.batches(users, torch.Generator().manual_seed(1)))
        loss = alone.loss(batch)
        loss.backward()
        want = {name: parameter.grad for name, parameter in alone.model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(alone.model.parameters(), 0.01)
        assert norm > 0.01
        task = task_without_dropout(head, encoded)
        before = copy.deepcopy(task.model.state_dict())
        alone_again = task.model
        with together(task, folder) as processes:
            model = task.model
            for name, x in processes.own_weights(model, before).items():
                assert torch.equal(model.state_dict()[name], x), name
            for name, x in processes.whole_weights(model).items():
                assert torch.equal(before[name], x), name
            got = task.loss(processes.part(batch))
            torch.testing.assert_close(got, loss)
            got.backward()
            processes.clip(model, 0.01)
            for name, x in processes.own_weights(model, want).items():
                found = model.get_parameter(name).grad
                torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
            # what `together` gives back at the end
            alone_again_best = {"description": task.description, "row": {}}
            processes.save_best(folder / task.name, model, alone_again_best)
        assert task.model is alone_again
        for name, x in before.items():
            assert torch.equal(task.model.state_dict()[name], x), name


def kill_after_the_first_epoch() -> None:
    fit = runs.fit

    def killed(*args, on_epoch, **kwargs):
        def on_epoch_or_kill(row):
            on_epoch(row)
            if row["epoch"] == 0 and int(os.environ["WORLD_SIZE"]) - 1 == RANK:
                os.kill(os.getpid(), signal.SIGKILL)

        return fit(*args, on_epoch=on_epoch_or_kill, **kwargs)

    runs.fit = killed


def main(folder: Path, head: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    encoded = encode_data(data.load(folder / "tiny"))
    try:
        gradients(head, encoded, folder / "gradients-run")
        said = ""
    except Exception:
        said = traceback.format_exc()
    (folder / f"gradients.{head}.{RANK}").write_text(said)
    task = task_without_dropout(head, encoded)
    with together(task, folder / "no-dropout"):
        rows = rows_without_dropout(task, folder / "no-dropout")
    (folder / f"rows.{head}.{RANK}").write_text(json.dumps(rows))
    runs.train_head(head, encoded, folder / "whole", Console(), epochs=EPOCHS)
    kill_after_the_first_epoch()
    runs.train_head(head, encoded, folder / "killed", Console(), epochs=EPOCHS)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
