"""`FusedMultiHeadAttention` as a module: parameters and state, what PyTorch computes for it, errors."""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_offsets
from helpers_nn import DIM, HEADS, assert_same, causal, make_pair, results
from torch import Tensor, nn

from attnrec.nn import FusedMultiHeadAttention, pytorch_path

USERS, CANDIDATES, EVENTS = 3, 5, 7


@pytest.fixture(autouse=True)
def forget_warnings():
    pytorch_path._told.clear()


# --- parameters and state -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"kdim": 24, "vdim": 12}, {"add_bias_kv": True}, {"bias": False}])
def test_same_seed_same_weights(arguments: dict[str, Any]) -> None:
    torch.manual_seed(5)
    theirs = nn.MultiheadAttention(DIM, HEADS, **arguments)
    torch.manual_seed(5)
    ours = FusedMultiHeadAttention(DIM, HEADS, **arguments)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, x in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], x), name
    torch.manual_seed(5)
    ours._reset_parameters()
    assert torch.equal(ours.state_dict()[name], x)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


def test_takes_torchs_arguments_by_position() -> None:
    ours = FusedMultiHeadAttention(32, 4, 0.1, False, True, True, 16, 24, True, "cpu", torch.float64)
    theirs = nn.MultiheadAttention(32, 4, 0.1, False, True, True, 16, 24, True, "cpu", torch.float64)
    for name in ("dropout", "add_zero_attn", "kdim", "vdim", "batch_first", "num_heads", "head_dim"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert {n: (p.shape, p.dtype) for n, p in ours.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in theirs.named_parameters()
    }


class FourLinears(nn.Module):
    """The attention that many recommenders write by hand."""

    def __init__(self, dim: int, num_heads: int, kdim: int | None = None, bias: bool = True) -> None:
        super().__init__()
        self.heads = num_heads
        self.query, self.out = nn.Linear(dim, dim, bias), nn.Linear(dim, dim, bias)
        self.key, self.value = (nn.Linear(kdim or dim, dim, bias) for _ in range(2))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f, x in ((self.query, query), (self.key, key), (self.value, value))
        )
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2)), weights


@pytest.mark.parametrize("arguments", [{}, {"kdim": 24}, {"bias": False}])
def test_loads_four_linears(arguments: dict[str, Any]) -> None:
    by_hand = FourLinears(DIM, HEADS, **arguments)
    widths = {"vdim": arguments["kdim"]} if "kdim" in arguments else {}
    ours = FusedMultiHeadAttention(DIM, HEADS, batch_first=True, **arguments, **widths)
    nested = nn.ModuleDict({"attention": ours})
    nested.load_state_dict({f"attention.{name}": x for name, x in by_hand.state_dict().items()})
    query, history = torch.randn(2, 3, DIM), torch.randn(2, 5, arguments.get("kdim", DIM))
    got = ours(query, history, history, average_attn_weights=False)
    torch.testing.assert_close(got, by_hand(query, history, history))


def test_four_linears_with_a_part_missing() -> None:
    state = FourLinears(DIM, HEADS).state_dict()
    del state["key.weight"]
    with pytest.raises(RuntimeError, match="in_proj_weight"):
        FusedMultiHeadAttention(DIM, HEADS).load_state_dict(state)


def test_copies_and_moves() -> None:
    ours, _ = make_pair(batch_first=True, add_bias_kv=True)
    ours.eval()
    x = torch.randn(USERS, EVENTS, DIM)
    wanted = ours(x, x, x)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), loaded):
        assert type(other) is FusedMultiHeadAttention
        assert not other.training
        torch.testing.assert_close(other(x, x, x), wanted, rtol=0, atol=0)
    wide = copy.deepcopy(ours).to(torch.float64)
    torch.testing.assert_close(wide(*[x.double()] * 3)[0].float(), wanted[0])
    on_meta = copy.deepcopy(ours).to("meta")
    assert on_meta.bias_k.device.type == "meta"


# --- PyTorch's path -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.filterwarnings("ignore:FusedMultiHeadAttention computes with PyTorch")
def test_dropout_draws_as_torch(need_weights: bool, fused_calls: list) -> None:
    ours, theirs = make_pair(dropout=0.4, batch_first=True)
    query, history = torch.randn(USERS, CANDIDATES, DIM), torch.randn(USERS, EVENTS, DIM)
    hidden = torch.arange(EVENTS) >= torch.tensor([[7], [3], [5]])
    drawn = []
    for module in (ours, theirs):
        torch.manual_seed(11)
        drawn.append(module(query, history, history, key_padding_mask=hidden, need_weights=need_weights))
    torch.testing.assert_close(*drawn)
    assert not fused_calls
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(query, history, history), theirs(query, history, history))
    assert len(fused_calls) == 1


def test_says_once_what_is_not_fused() -> None:
    ours, _ = make_pair(batch_first=True, dropout=0.1)
    x = torch.randn(2, 4, DIM)
    small = FusedMultiHeadAttention(8, 2)

    def messages(module: nn.Module, *inputs: Tensor, **call: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                module(*inputs, **call)
        return [str(warning.message) for warning in caught]

    assert len(told := messages(ours, x, x, x)) == 1
    assert "dropped while training" in told[0]
    ours.eval()
    assert not messages(ours, x, x, x)
    assert len(told := messages(ours, x, x, x, attn_mask=torch.randn(4, 4))) == 1
    assert "attn_mask" in told[0]
    assert len(told := messages(small, *[x[..., :8]] * 3)) == 1
    assert "head dim 4" in told[0]


@pytest.mark.parametrize("embed_dim", [4, 514])
@pytest.mark.filterwarnings("ignore:FusedMultiHeadAttention computes with PyTorch")
def test_head_dims_of_pytorch(embed_dim: int) -> None:
    ours, theirs = make_pair(embed_dim, 2, dtype=torch.float64)
    inputs = [torch.randn(3, 2, embed_dim, dtype=torch.float64) for _ in range(3)]
    assert_same(results(ours, inputs, "shared"), results(theirs, inputs, "shared"))


# --- errors -------------------------------------------------------------------------------------------------


def test_errors_name_the_argument() -> None:
    ours = FusedMultiHeadAttention(DIM, HEADS, kdim=24, vdim=12, batch_first=True)
    q, k, v = torch.randn(2, 3, DIM), torch.randn(2, 5, 24), torch.randn(2, 5, 12)
    rows = q[0], k[0], v[0]
    offsets = {"q_offsets": make_offsets([3]), "kv_offsets": make_offsets([5])}
    nested = [torch.nested.nested_tensor(list(x), layout=torch.jagged) for x in (q, k, v)]
    cases: list[tuple[type[Exception], str, tuple[Tensor, ...], dict[str, Any]]] = [
        (TypeError, "query must be a tensor, got ndarray", (q.numpy(), k, v), {}),
        (TypeError, "value must be a tensor, got NoneType", (q, k, None), {}),
        (TypeError, "attn_mask must be a tensor, got list", (q, k, v), {"attn_mask": [[False] * 5] * 3}),
        (ValueError, "query must be 3-D", (q[None], k, v), {}),
        (ValueError, "query must have 32 features", (k, k, v), {}),
        (ValueError, "key must be 3-D", (q, k[0], v), {}),
        (ValueError, "key must have 24 features", (q, v, v), {}),
        (ValueError, "key must have query's batch size 2, got 1", (q, k[:1], v[:1]), {}),
        (ValueError, "value must have 12 features", (q, k, k), {}),
        (ValueError, "value must have as many rows as key", (q, k, v[:, 1:]), {}),
        (
            ValueError,
            r"key_padding_mask must have shape \(2, 5\)",
            (q, k, v),
            {"key_padding_mask": causal(2, 4)},
        ),
        (
            TypeError,
            "key_padding_mask must be boolean",
            (q, k, v),
            {"key_padding_mask": torch.ones(2, 5).int()},
        ),
        (
            ValueError,
            r"attn_mask must have shape \(3, 5\) or \(4, 3, 5\)",
            (q, k, v),
            {"attn_mask": causal(5, 3)},
        ),
        (TypeError, "attn_mask must be boolean", (q, k, v), {"attn_mask": torch.ones(3, 5).long()}),
        (RuntimeError, "attn_mask, which is missing", (q, k, v), {"is_causal": True}),
        (ValueError, "visible goes with packed", (q, k, v), {"visible": torch.ones(6).long()}),
        (ValueError, "kv_lengths goes with packed", (q, k, v), {"kv_lengths": torch.ones(2).long()}),
        (ValueError, "max_kv_length goes with packed", (q, k, v), {"max_kv_length": 5}),
        (ValueError, "kv_offsets is missing", rows, {"q_offsets": offsets["q_offsets"]}),
        (ValueError, "q_offsets is missing", rows, {"kv_offsets": offsets["kv_offsets"]}),
        (ValueError, "key must be packed", (rows[0], k, rows[2]), offsets),
        (ValueError, "attn_mask goes with dense", rows, {**offsets, "attn_mask": causal(3, 5)}),
        (
            ValueError,
            "is_causal and visible",
            rows,
            {**offsets, "is_causal": True, "visible": torch.ones(3).long()},
        ),
        (ValueError, "key must be nested", (nested[0], k, v), {}),
        (ValueError, "key is nested", (q, nested[1], v), {}),
        (ValueError, "go with packed input, got nested", tuple(nested), offsets),
        (ValueError, "key_padding_mask goes with dense", tuple(nested), {"key_padding_mask": causal(2, 5)}),
    ]
    for error, message, inputs, call in cases:
        with pytest.raises(error, match=message):
            ours(*inputs, **call)
    shorter = torch.nested.nested_tensor([v[0, 1:], v[1]], layout=torch.jagged)
    with pytest.raises(ValueError, match="value must have as many rows"):
        ours(nested[0], nested[1], shorter)


@pytest.mark.parametrize("path", ["fused", "pytorch"])
@pytest.mark.parametrize(
    ("name", "bad", "error", "message"),
    [
        ("q_offsets", [2, 1], ValueError, "q_offsets must end at 5, .* got 3"),
        ("q_offsets", [2, 4], ValueError, "q_offsets must end at 5, .* got 6"),
        ("q_offsets", [6, -1], ValueError, "q_offsets must not fall, got 6 and then 5"),
        ("kv_offsets", [3, 5], ValueError, "kv_offsets must end at 7, .* got 8"),
        ("kv_offsets", [3, 3, 1], ValueError, r"kv_offsets must have shape .*\[3\].*, got \[4\]"),
        ("kv_offsets", [7], ValueError, r"kv_offsets must have shape .*\[3\].*, got \[2\]"),
        (
            "kv_lengths",
            torch.tensor([4, 4]),
            ValueError,
            r"kv_lengths must .*room \(3\), got 4 at position 0",
        ),
        ("kv_lengths", torch.tensor([3]), ValueError, r"kv_lengths must have shape \[B\] = \[2\], got \[1\]"),
        ("visible", torch.tensor([1, 1, 1, 5, 1]), ValueError, "visible must .*, got 5 at position 3"),
        ("visible", torch.ones(4).long(), ValueError, r"visible must have shape \[T_c\] = \[5\], got \[4\]"),
        ("visible", torch.ones(5), TypeError, "visible must be int32 or int64, got float32"),
        ("max_kv_length", 3, ValueError, "max_kv_length must be at least 4, the events of user 1, got 3"),
    ],
)
@pytest.mark.filterwarnings("ignore:FusedMultiHeadAttention computes with PyTorch")
def test_packed_input_that_does_not_fit(
    path: str, name: str, bad: Any, error: type[Exception], message: str
) -> None:
    """Also where no kernel is called, which would refuse it."""
    ours = FusedMultiHeadAttention(DIM, HEADS, dropout=0.1 if path == "pytorch" else 0.0)
    query, history = torch.randn(5, DIM), torch.randn(7, DIM)
    good = {"q_offsets": make_offsets([2, 3]), "kv_offsets": make_offsets([3, 4])}
    bad = make_offsets(bad) if isinstance(bad, list) else bad
    for is_causal in (False, True) if name != "visible" else (False,):
        with pytest.raises(error, match=message):
            ours(query, history, history, is_causal=is_causal, **good | {name: bad})


def test_offsets_that_are_no_tensors() -> None:
    ours, x = FusedMultiHeadAttention(DIM, HEADS), torch.randn(5, DIM)
    for offsets, error, message in (
        ([0, 2, 5], TypeError, "q_offsets must be a tensor, got list"),
        (make_offsets([5])[:0], ValueError, r"q_offsets must have shape \[B \+ 1\], got \[0\]"),
    ):
        with pytest.raises(error, match=message):
            ours(x, x, x, q_offsets=offsets, is_causal=True)


def test_the_examples_of_the_documentation_run() -> None:
    text = (Path(__file__).parent.parent / "docs" / "drop-in.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 4
    names: dict[str, Any] = {}
    for example in examples:
        exec(example, names)
    assert names["out"].is_nested
    assert names["weights"].shape == (3, 70, 70)
