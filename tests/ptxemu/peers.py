"""Kernels that others wrote: flash-linear-attention's, where it is installed."""

import contextlib
import importlib
from unittest import mock

import torch


@contextlib.contextmanager
def on_an_a100():
    """Answers what these packages ask torch about the GPU."""
    with (
        mock.patch.object(torch.cuda, "get_device_name", return_value="NVIDIA A100"),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(8, 0)),
    ):
        yield


def parallel_attn():
    """flash-linear-attention's softmax attention, or None: causal, of a batch `[1, T_l, heads, D]` with
    `cu_seqlens`. To be called under `on_an_a100` and `emulated`."""
    try:
        return importlib.import_module("fla.ops.attn.parallel").parallel_attn
    except ImportError:
        return None
