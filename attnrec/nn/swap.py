"""Putting the fused attention into a model that is already built."""

from __future__ import annotations

from torch import nn

from .attention import FusedMultiHeadAttention


def swap_attention(model: nn.Module) -> list[str]:
    """Turns every `torch.nn.MultiheadAttention` in `model` into a `FusedMultiHeadAttention`.

    The modules stay the objects they are and change their class: parameters (an optimizer holds them),
    hooks, device, dtype, training mode, and every reference to them are untouched. Also in the encoder and
    decoder layers of `torch.nn.Transformer`, whose own fast path then no longer computes the attention.
    Subclasses of `torch.nn.MultiheadAttention`, which may compute something else, are left alone.

    Returns:
        The names of the modules that it changed, as in `model.named_modules()` (the model itself is "").
    """
    swapped = []
    for name, module in model.named_modules():
        if type(module) is nn.MultiheadAttention:
            module.__class__ = FusedMultiHeadAttention
            module._refuse_foreign_fast_paths()
            swapped.append(name)
    return swapped
