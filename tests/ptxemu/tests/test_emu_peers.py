"""Kernels that nobody here wrote, against float64: a wrong instruction of the emulator would show in them."""

import os
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("compiled code is executed, and this process interprets", allow_module_level=True)

from ptxemu import emulated, peers


@pytest.fixture(autouse=True)
def emulator():
    torch.manual_seed(0)
    with peers.on_an_a100(), emulated():
        yield


def close(got, want, tolerance):
    """Largest error relative to the largest magnitude."""
    error = (got.detach().double() - want.detach()).abs().max() / want.detach().abs().max()
    assert error <= tolerance, float(error)


def both(function, exact, tolerance, *inputs):
    """Outputs and the gradients of the inputs, against the same in float64."""
    mine = [x.clone().requires_grad_() for x in inputs]
    wide = [x.double().requires_grad_() for x in inputs]
    out, want = function(*mine), exact(*wide)
    close(out, want, tolerance)
    grad = torch.randn(want.shape, dtype=torch.float64)
    grads = torch.autograd.grad(out, mine, grad.to(out.dtype))
    for g, w in zip(grads, torch.autograd.grad(want, wide, grad.to(out.dtype).double()), strict=True):
        close(g, w, tolerance)


@pytest.mark.parametrize("lengths", [[130], [70, 1, 59]])
def test_attention_of_flash_linear_attention(lengths):
    """Causal, grouped heads, bf16, autotuned; one history and a jagged batch of them."""
    parallel_attn = peers.parallel_attn()
    if parallel_attn is None:
        pytest.skip("fla-core (flash-linear-attention) is not installed")
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    q = torch.randn(1, 130, 4, 64).bfloat16()
    k, v = (torch.randn(1, 130, 2, 64).bfloat16() for _ in range(2))

    def exact(q, k, v):
        parts = []
        for a, b in pairwise(offsets.tolist()):
            qq, kk, vv = (x[:, a:b].transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(qq, kk, vv, is_causal=True, enable_gqa=True)
            parts.append(out.transpose(1, 2))
        return torch.cat(parts, 1)

    both(lambda *x: parallel_attn(*x, cu_seqlens=offsets), exact, 1e-2, q, k, v)


class TestLiger:
    @pytest.fixture(autouse=True)
    def ops(self):
        self.ops = pytest.importorskip("liger_kernel.ops", reason="liger-kernel is not installed")

    def test_normalisation(self):
        x, weight, bias = torch.randn(20, 96), torch.rand(96) + 0.5, torch.randn(96)
        both(
            lambda x, w: self.ops.LigerRMSNormFunction.apply(x, w, 1e-6),
            lambda x, w: F.rms_norm(x, (96,), w, 1e-6),
            1e-6,
            x,
            weight,
        )
        both(
            lambda *a: self.ops.LigerLayerNormFunction.apply(*a, 1e-6),
            lambda x, w, b: F.layer_norm(x, (96,), w, b, 1e-6),
            1e-6,
            x,
            weight,
            bias,
        )

    def test_softmax(self):
        both(self.ops.LigerSoftmaxFunction.apply, lambda x: x.softmax(-1), 1e-6, torch.randn(20, 1000) * 3)

    def test_cross_entropy(self):
        """With label smoothing and an ignored target."""
        target = torch.randint(0, 300, (20,))
        target[3] = -100

        def liger(x):
            return self.ops.LigerCrossEntropyFunction.apply(x, target, None, -100, 0.0, 0.1, "mean")[0]

        both(liger, lambda x: F.cross_entropy(x, target, label_smoothing=0.1), 1e-6, torch.randn(20, 300))
