"""Incremental learning: a trained head goes on from its weights on a data set that has grown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from .checkpoint import CheckpointError, load_checkpoint, load_weights
from .runs import train_head
from .tasks import Encoded, RankingTask, RetrievalTask
from .vocabulary import Vocabulary

EPOCHS = 5  # at the head's own learning rate: by the validation events better than at a third of it


def update_head(
    head: str, encoded: Encoded, folder: Path, console: Console, **changes: Any
) -> tuple[RetrievalTask | RankingTask, list[dict[str, float]]]:
    """Trains the head of `folder/<head>` further, on the users who have more events than it was trained with.

    Users, items and categories are found again by name; new ones start as in a new model. The weights take
    the place of the old ones. Arguments and result are those of `runs.train_head`.

    Raises:
        FileNotFoundError: nothing was trained there.
        CheckpointError: the model does not fit the data (`Vocabulary.carry`), or nobody has more events.
    """
    path = folder / head / "best.safetensors"
    tensors, saved = load_checkpoint(path)
    if "vocabulary" not in saved:
        raise CheckpointError(f"{path}: does not name its rows: train afresh")
    before, now = Vocabulary(**saved["vocabulary"]), encoded.vocabulary()
    users = before.users_with_more(now)
    if not users:
        raise CheckpointError(f"{path}: nobody has more events than it was trained with")

    def prepare(task: RetrievalTask | RankingTask) -> None:
        if saved["description"]["model"] != task.description["model"]:
            raise CheckpointError(f"{path}: made with model = {saved['description']['model']}")
        load_weights(path, task.model, before.carry(tensors, task.model.state_dict(), now))
        task.training_users = np.array(users)

    return train_head(head, encoded, folder, console, prepare=prepare, **{"epochs": EPOCHS} | changes)
