"""The ops in their native form, as the public functions call them."""

from attnrec.reference import (
    catalog_cross_entropy,
    catalog_topk,
    softmax_score,
    target_attention,
    target_attention_top,
    target_attention_weights,
)

__all__ = [
    "catalog_cross_entropy",
    "catalog_topk",
    "softmax_score",
    "target_attention",
    "target_attention_top",
    "target_attention_weights",
]
