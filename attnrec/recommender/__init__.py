"""A thin recommender on attnrec: two heads on one encoder, trained and measured on real interactions.

`model.py` shows all of it in one file. On the command line: `python -m attnrec.recommender --help`. It needs
the extra: `pip install 'attnrec[recommender]'`.
"""

try:
    import rich  # noqa: F401
    import safetensors  # noqa: F401
    import torchmetrics  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f"attnrec.recommender needs {error.name}: pip install 'attnrec[recommender]'", name=error.name
    ) from error

from .clicks import click_metrics
from .data import Fields, Interactions, load
from .evaluation import catalog_lists, evaluate
from .metrics import ListMetrics
from .model import Candidates, History, Ranking, RankingConfig, Retrieval, RetrievalConfig
from .tasks import Encoded, RankingTask, RetrievalTask, encode_data, restore
from .train import TrainConfig, fit

__all__ = [
    "Candidates",
    "Encoded",
    "Fields",
    "History",
    "Interactions",
    "ListMetrics",
    "Ranking",
    "RankingConfig",
    "RankingTask",
    "Retrieval",
    "RetrievalConfig",
    "RetrievalTask",
    "TrainConfig",
    "catalog_lists",
    "click_metrics",
    "encode_data",
    "evaluate",
    "fit",
    "load",
    "restore",
]
