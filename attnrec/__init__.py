"""attnrec: the attention of recommender models, fast."""

from pathlib import Path
from typing import Any

# An install puts the kernels into this package; in a source tree that is not installed they lie beside it.
_tree = Path(__file__).resolve().parent.parent
if (_tree / "csrc" / "library.cpp").exists():
    __path__.append(str(_tree))

from attnrec.catalog import Catalog, CatalogFileError  # noqa: E402
from attnrec.functional import (  # noqa: E402
    catalog_cross_entropy,
    catalog_topk,
    softmax_score,
    target_attention,
    target_attention_weights,
)
from attnrec.nn import FusedMultiHeadAttention, swap_attention  # noqa: E402
from attnrec.ops import debug, explain, use_backend  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "Catalog",
    "CatalogFileError",
    "FusedMultiHeadAttention",
    "ShardedCatalog",
    "catalog_cross_entropy",
    "catalog_topk",
    "debug",
    "explain",
    "softmax_score",
    "swap_attention",
    "target_attention",
    "target_attention_weights",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    # On first use: it imports torch.distributed.tensor, which takes half as long as torch itself.
    if name == "ShardedCatalog":
        from attnrec.catalog.sharded import ShardedCatalog

        return ShardedCatalog
    raise AttributeError(f"module 'attnrec' has no attribute {name!r}")
