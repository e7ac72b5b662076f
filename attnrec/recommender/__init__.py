"""A thin recommender on attnrec: two heads on one encoder, trained and measured on real interactions.

`model.py` shows all of it in one file. On the command line: `python -m attnrec.recommender --help`. It needs
the extra: `pip install 'attnrec[recommender]'`.
"""

from .data import Fields, Interactions, load
from .model import Candidates, History, Ranking, RankingConfig, Retrieval, RetrievalConfig
from .tasks import Encoded, RankingTask, RetrievalTask, encode_data, restore
from .train import TrainConfig, fit

__all__ = [
    "Candidates",
    "Encoded",
    "Fields",
    "History",
    "Interactions",
    "Ranking",
    "RankingConfig",
    "RankingTask",
    "Retrieval",
    "RetrievalConfig",
    "RetrievalTask",
    "TrainConfig",
    "encode_data",
    "fit",
    "load",
    "restore",
]
