"""Modules: a drop-in for `torch.nn.MultiheadAttention`, and the swap that puts it into a model."""

from .attention import FusedMultiHeadAttention
from .swap import swap_attention

__all__ = ["FusedMultiHeadAttention", "swap_attention"]
