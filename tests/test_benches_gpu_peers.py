"""The adapters of the GPU peers, on the CPU: each calls a stand-in that has the library's own signature.

The stand-ins compute by plain PyTorch what the libraries document, and are as strict as those where an
adapter could be wrong: dtypes of offsets, orders of arguments, packed layouts. What they cannot show is that
the libraries' kernels run.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benches import catalog_cross_entropy, registry
from benches.case import Refused
from benches.jagged import make_batch
from benches.peers import PACKAGES, flash, need, xformers
from benches.target_attention import AttentionProblem

CPU, COUNTS, EVENTS = torch.device("cpu"), [3, 1, 5], [7, 2, 4]


@pytest.fixture(autouse=True)
def the_cpu_counts_as_a_gpu(monkeypatch):
    for module in (flash, xformers, catalog_cross_entropy):
        monkeypatch.setattr(module, "need_device", lambda device, kind: None)


def _install(monkeypatch, name, **members):
    """A module of this name, and the packages around it."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    for member, value in members.items():
        setattr(sys.modules[name], member, value)


def _users(query, key, value, q_counts, kv_counts, mask):
    """`[T, H, D]` user by user; `mask(c, n)` of a user, or None."""
    outs = []
    for q, k, v in zip(query.split(q_counts), key.split(kv_counts), value.split(kv_counts), strict=True):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        seen = None if mask is None else mask(q.shape[1], k.shape[1])
        group = q.shape[0] // k.shape[0]
        k, v = (x.repeat_interleave(group, 0) for x in (k, v))
        outs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(0, 1))
    return torch.cat(outs)


def _bottom_right(c, n):
    return torch.ones(c, n, dtype=torch.bool).tril(n - c)


def _top_left(c, n):
    return torch.ones(c, n, dtype=torch.bool).tril()


# --- flash-attn 2: flash_attn_interface.py ------------------------------------------------------------------


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    q_counts, kv_counts = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert (max_seqlen_q, max_seqlen_k) == (max(q_counts), max(kv_counts))
    assert isinstance(max_seqlen_q, int)
    return _users(q, k, v, q_counts, kv_counts, _bottom_right if causal else None)


# --- xformers: ops/fmha -------------------------------------------------------------------------------------


class BlockDiagonalMask:
    def __init__(self, q_seqlen, kv_seqlen, causal=False):
        self.q_seqlen, self.kv_seqlen, self.causal = q_seqlen, kv_seqlen, causal

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        return cls(list(q_seqlen), list(q_seqlen if kv_seqlen is None else kv_seqlen))

    def make_causal(self):
        return BlockDiagonalMask(self.q_seqlen, self.kv_seqlen, causal=True)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    assert query.dim() == 4
    assert query.shape[0] == 1  # of a block-diagonal mask all users are one row
    assert key.shape[2] == query.shape[2]
    mask = _top_left if attn_bias.causal else None
    rows = (x.squeeze(0) for x in (query, key, value))
    return _users(*rows, attn_bias.q_seqlen, attn_bias.kv_seqlen, mask).unsqueeze(0)


# --- Liger and cut cross-entropy ----------------------------------------------------------------------------


class LigerFusedLinearCrossEntropyLoss(torch.nn.Module):
    def forward(self, lin_weight, _input, target, bias=None):
        return F.cross_entropy((_input @ lin_weight.T).float(), target)


def linear_cross_entropy(
    e,
    c,
    targets,
    bias=None,
    ignore_index=-100,
    softcap=None,
    reduction="mean",
    shift=0,
    filter_eps="auto",
    accum_e_fp32=False,
    accum_c_fp32=False,
    filter_e_grad=True,
    filter_c_grad=True,
    impl="cce",
    vocab_parallel_options=None,
):
    assert filter_eps is None, "the default drops small terms of the gradient"
    return F.cross_entropy((e @ c.T).float(), targets)


@pytest.fixture
def libraries(monkeypatch):
    _install(monkeypatch, "flash_attn", flash_attn_varlen_func=flash_attn_varlen_func)
    _install(
        monkeypatch,
        "xformers.ops",
        memory_efficient_attention=memory_efficient_attention,
        fmha=SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask),
    )
    _install(
        monkeypatch,
        "liger_kernel.transformers",
        LigerFusedLinearCrossEntropyLoss=LigerFusedLinearCrossEntropyLoss,
    )
    _install(monkeypatch, "cut_cross_entropy", linear_cross_entropy=linear_cross_entropy)


def _right(problem, contender):
    verdict = problem.check(contender.read(contender.call()), ours=False)
    assert verdict.right, verdict


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("peer", [flash, xformers])
def test_attention(libraries, peer, causal, train):
    events = COUNTS if causal else EVENTS
    options = {"dtype": "bf16", "device": CPU, "causal": causal, "train": train}
    batch = make_batch(COUNTS, events, heads=4, dim=8, **options)
    _right(AttentionProblem(batch), peer.attention(batch))


def test_grouped_heads(libraries):
    batch = make_batch(COUNTS, EVENTS, heads=4, kv_heads=2, dim=8, dtype="bf16", device=CPU)
    _right(AttentionProblem(batch), flash.attention(batch))
    with pytest.raises(Refused, match="grouped"):
        xformers.attention(batch)


def test_what_flash_attention_does_not_take_is_refused(libraries):
    with pytest.raises(Refused, match="float32"):
        flash.attention(make_batch(COUNTS, EVENTS, heads=4, dim=8, device=CPU))
    batch = make_batch(COUNTS, EVENTS, heads=4, dim=8, dtype="bf16", device=CPU, causal=True)
    with pytest.raises(Refused, match="as many candidates as events"):
        flash.attention(batch)


@pytest.mark.parametrize("peer", [catalog_cross_entropy.liger, catalog_cross_entropy.cut])
def test_loss(libraries, peer):
    problem = catalog_cross_entropy.LossProblem(6, 50, 8, "bf16", CPU)
    _right(problem, peer(problem))


# --- which are there, and which are listed ------------------------------------------------------------------


def test_a_missing_library_is_named(monkeypatch):
    for module, package in PACKAGES.items():
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not there
        with pytest.raises(Refused, match=package):
            need(module)


def test_a_broken_library_is_named(monkeypatch, tmp_path):
    (tmp_path / "flash_attn.py").write_text("raise OSError('libcudart.so.13: cannot open')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    with pytest.raises(Refused, match="libcudart"):
        need("flash_attn")


def test_gpu_peers_stand_in_every_family_that_a_gpu_runs():
    cases = [case for case in registry.all_cases() if case.suite == "standard"]
    for family in ("table", "log-normal", "zipf", "request", "ikbo", "hstu-cross", "stca", "train"):
        of = [case for case in cases if case.key.startswith(f"target_attention/{family}/")]
        assert of
        assert all({"flash-attn", "xformers"} <= case.peers.keys() for case in of), family
    of = [case for case in cases if case.key.startswith("catalog_cross_entropy/catalog/")]
    assert of
    assert all({"liger", "cut-cross-entropy"} <= case.peers.keys() for case in of)
    assert any("flex_attention" in case.peers and case.dtype == "bf16" for case in registry.all_cases())
