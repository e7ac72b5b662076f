"""attnrec: the attention of recommender models, fast."""

from attnrec.functional import (
    catalog_cross_entropy,
    catalog_topk,
    softmax_score,
    target_attention,
    target_attention_weights,
)
from attnrec.nn import FusedMultiHeadAttention, swap_attention
from attnrec.ops import debug, explain, use_backend

__version__ = "0.1.0"

__all__ = [
    "FusedMultiHeadAttention",
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
