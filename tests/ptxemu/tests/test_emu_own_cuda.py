"""As test_emu_own_kernels.py, of the project's CUDA C++ kernels: planted faults are caught."""

from functools import partial

import pytest
import torch
from helpers import OPTIONS, assert_matches_reference, make_offsets
from ptxemu import project
from test_emu_own_kernels import (
    BF16,
    CANDIDATES,
    assert_addresses_have_64_bits,
    assert_faults_are_caught,
    attention,
    catalog,
    check_of,
    emulator_of,
)

pytestmark = pytest.mark.skipif(project.why_not() is not None, reason=str(project.why_not()))


def long_user(name, dtype=BF16, differentiate=()):
    """A user with more items than a block takes, alone, and few of them count: one in each pass of the block.
    In a batch where others' probabilities are larger, their rounding errors would hide this one's faults."""
    generator = torch.Generator().manual_seed(0)
    users, items = (torch.randn(n, 64, generator=generator) for n in (1, 1030))
    count = [9, 300, 600, 900, 1027]
    items[count] = users / 2 + items[count] / 10
    args = users.to(dtype), items.to(dtype), make_offsets([1030])
    return partial(assert_matches_reference, name, *args, temperature=3.0, differentiate=differentiate)


# Rows for several warps in a block: without them a barrier says nothing.
ROWS = {"rows": (80, 0, 33)}
CASES = {  # name -> (makes a case, with what)
    "target_attention": (
        attention, "target_attention", {"options": OPTIONS, "dim": 64, "kv_heads": 1, **ROWS}
    ),
    "target_attention, float32": (attention, "target_attention", {"dim": 20, "dtype": torch.float32, **ROWS}),
    "target_attention, long": (
        attention, "target_attention", {"dim": 16, "heads": 1, "rows": (40,), "events": (1100,)}
    ),
    "softmax_score": (catalog, "softmax_score", CANDIDATES, {"rows": 4}),
    "softmax_score, long": (long_user, "softmax_score", {}),
    "softmax_score_backward": (catalog, "softmax_score", CANDIDATES, {"rows": 4, "differentiate": (0,)}),
    "softmax_score_backward, long": (long_user, "softmax_score", {"differentiate": (0,)}),
    "softmax_score_backward, long, float32": (
        long_user, "softmax_score", {"differentiate": (0,), "dtype": torch.float32}
    ),
    "target_attention_backward": (
        attention,
        "target_attention",
        {"options": OPTIONS, "dim": 32, "kv_heads": 1, "differentiate": (0, 1), **ROWS},
    ),
    "target_attention_weights": (
        attention, "target_attention_weights", {"dim": 32, "options": ["key_bias"], **ROWS}
    ),
    "target_attention_top": (attention, "target_attention_top", 10, {"dim": 32, **ROWS}),
    "catalog_topk": (catalog, "catalog_topk", 5, {"rows": 3, "items": 2500, "dim": 32}),
    "catalog_cross_entropy": (catalog, "catalog_cross_entropy", "ids", {"rows": 80}),
    "catalog_cross_entropy_backward": (
        catalog, "catalog_cross_entropy", "ids", {"rows": 80, "differentiate": (0,)}
    ),
}  # fmt: skip
OF_FORWARD = (
    "target_attention_kernel",
    "score_kernel",
    "normalize_kernel",
    "log_sum_kernel",
    "cross_entropy_loss_kernel",
)
FAR = {case: {} for case in CASES if "," not in case}
FAR |= {case: {"options": ()} for case in FAR if case.startswith("target_attention")}
FAR["catalog_topk"] = {"items": 300}


@pytest.fixture
def emulator(monkeypatch):
    return emulator_of("cuda", project.served, monkeypatch)


def kernels_of(case, launches):
    """The names of the kernels of the case's own pass."""
    others = OF_FORWARD if "backward" in case else ()
    return sorted({name for name in launches.forms.values() if not any(x in name for x in others)})


@pytest.mark.parametrize("case", CASES)
def test_planted_faults_are_caught(case, emulator):
    assert_faults_are_caught(check_of(CASES[case]), emulator, partial(kernels_of, case))


@pytest.mark.parametrize("case", FAR)
def test_addresses_of_32_bits(case, emulator):
    check = check_of(CASES[case], far=True, **FAR[case])
    assert_addresses_have_64_bits(check, emulator, partial(kernels_of, case))
