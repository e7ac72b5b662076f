"""Who and what the rows of a trained model are, so that they are found again in a data set that has grown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checkpoint import CheckpointError, Tensors
from .data import Interactions
from .features import Categories, Feature


@dataclass(frozen=True)
class Vocabulary:
    """The names of a model's rows. A checkpoint has it as JSON: `vars(vocabulary)`."""

    users: list[str]
    items: list[str]
    events: list[int]  # of each user
    user_words: list[list[str] | None]  # of each feature; None for a dense one
    item_words: list[list[str] | None]
    thresholds: list[float]

    @classmethod
    def of(
        cls,
        data: Interactions,
        user_features: Sequence[Feature],
        item_features: Sequence[Feature],
        thresholds: list[float],
    ) -> Vocabulary:
        return cls(
            data.user_names,
            data.item_names,
            data.lengths.tolist(),
            [_words(feature) for feature in user_features],
            [_words(feature) for feature in item_features],
            thresholds,
        )

    def users_with_more(self, now: Vocabulary) -> list[int]:
        """The numbers in `now` of the users who have more events than here."""
        before = dict(zip(self.users, self.events, strict=True))
        counts = enumerate(zip(now.users, now.events, strict=True))
        return [number for number, (name, count) in counts if count > before.get(name, 0)]

    def carry(self, tensors: Tensors, into: Tensors, now: Vocabulary) -> Tensors:
        """Weights of a model of this vocabulary as those of a model of `now`.

        Rows go by name: what is new keeps the row of `into`, the new model's weights at its start; what is
        gone is dropped.

        Raises:
            CheckpointError: rating levels or features are others, so that there is no row to put a row.
        """
        if self.thresholds != now.thresholds:
            raise CheckpointError(
                f"rating levels were {self.thresholds} and are {now.thresholds}: train afresh"
            )
        users, items = (self.users, now.users), (self.items, now.items)
        rows = {"users.identity": users, "items.identity": items}
        rows |= {"user_bias": users, "item_bias": items, "bias": items}
        for kind in ("user", "item"):
            features = getattr(self, f"{kind}_words"), getattr(now, f"{kind}_words")
            if [words is None for words in features[0]] != [words is None for words in features[1]]:
                raise CheckpointError(f"the {kind} features are others than they were: train afresh")
            for number, words in enumerate(zip(*features, strict=True)):
                if words[0] is not None:
                    rows[f"{kind}s.tables.{number}"] = words
        out = {}
        for name, tensor in tensors.items():
            if name in rows:
                out[name] = _by_name(tensor, into[name], *rows[name])
            elif tensor.shape == into[name].shape:
                out[name] = tensor
            else:
                raise CheckpointError(
                    f"{name} was {list(tensor.shape)} and is {list(into[name].shape)}: train afresh"
                )
        return out


def _words(feature: Feature) -> list[str] | None:
    return feature.words if isinstance(feature, Categories) else None


def _by_name(old: Tensor, new: Tensor, old_names: list[str], new_names: list[str]) -> Tensor:
    row = {name: number for number, name in enumerate(old_names)}
    kept = [(number, row[name]) for number, name in enumerate(new_names) if name in row]
    out = new.clone()
    if kept:
        to, source = torch.tensor(kept).T
        out[to] = old[source]
    return out
