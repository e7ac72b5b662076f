"""The contract suite's own checks catch faults that are planted in the compiled PTX of the project's kernels.

For each kernel and kind of fault, some of the faults that can be planted in lines that run: each is caught,
by the emulator or by the comparison with the reference, or no result changes (Triton emits waits that others
cover, and guards that are true). The mutation command (mutate.py) does it at large.
"""

import mmap
import os
import random
import re

import helpers
import pytest
import torch
from helpers import assert_matches_reference, make_jagged, make_offsets, outputs_and_grads

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("compiled code is executed, and this process interprets", allow_module_level=True)

from ptxemu import PtxError, session
from ptxemu.mutations import mutants

import attnrec
from attnrec import kernels

BF16 = torch.bfloat16


def attention(differentiate=(), **changes):
    batch = make_jagged([70, 0, 9], [129, 17, 257], **{"heads": 2, "dim": 64, "dtype": BF16, **changes})
    return lambda: assert_matches_reference(
        "target_attention", *batch.args, differentiate=differentiate, **batch.options
    )


def catalog(name, *args, differentiate=(), rows=40, items=700, dim=64, **options):
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if name == "softmax_score" else BF16  # of products by matrix instructions
    users, table = (torch.randn(n, dim, generator=generator).to(dtype) for n in (rows, items))
    target = torch.randint(0, items, (rows,), generator=generator)
    # Probabilities neither of one size, where rows could be swapped, nor so different that the small ones
    # would not matter.
    options |= {"temperature": 8.0 if name == "softmax_score" else 3.0}
    if name == "softmax_score":
        users, args = users[:4], [make_offsets([300, 0, 7, 393])]
    elif name == "catalog_cross_entropy":
        args = [target]
    return lambda: assert_matches_reference(name, users, table, *args, differentiate=differentiate, **options)


CASES = {  # name -> (op that has to be there, what runs and checks it)
    "target_attention": ("target_attention", attention()),
    "target_attention, options": (
        "target_attention",
        attention(options=("visible", "self", "key_bias", "kv_lengths"), kv_heads=1, dtype=torch.float16),
    ),
    "target_attention_backward": ("target_attention_backward", attention((0, 1))),
    "softmax_score": ("softmax_score", catalog("softmax_score", differentiate=(0,))),
    "catalog_topk": ("catalog_topk", catalog("catalog_topk", 20)),
    "catalog_cross_entropy": (
        "catalog_cross_entropy_backward",
        catalog("catalog_cross_entropy", differentiate=(0,)),
    ),
}


class Launches:
    """The forms of the kernels that run, their lines that run, and the results of the op."""

    def __init__(self):
        self.forms, self.lines, self.results = {}, {}, []

    def __call__(self, call, stats):
        self.forms[call.compiled] = call.name
        self.lines[call.compiled] = self.lines.get(call.compiled, set()) | stats.lines

    def keep(self, function, *args, **kwargs):
        outputs, grads = outputs_and_grads(function, *args, **kwargs)
        self.results += [x.detach().clone() for x in (*outputs, *grads.values())]
        return outputs, grads

    def alike(self, other):
        """Whether no result differs by more than a rounding step of its largest value: 1 item too many of 300
        is less than bf16 can tell."""
        for x, y in zip(self.results, other.results, strict=True):
            step = torch.finfo(x.dtype).eps if x.is_floating_point() else 0
            finite = x.isfinite() & y.isfinite()
            x_, y_ = x[finite].double(), y[finite].double()
            if x_.numel() and (x_ - y_).abs().max() > step * x_.abs().max():
                return False
            if not torch.equal(x[~finite], y[~finite]):
                return False
        return True


@pytest.fixture
def emulator(monkeypatch):
    """run(check, edit) -> (what caught it or None, Launches)."""

    def run(check, edit=None):
        launches = Launches()
        monkeypatch.setattr(session, "observe", launches)
        monkeypatch.setattr(helpers, "outputs_and_grads", launches.keep)
        monkeypatch.setattr(session, "edit", edit)
        monkeypatch.setattr(session, "max_steps", 100_000)
        with session.session(), attnrec.use_backend("triton"):
            try:
                check()
            except (PtxError, AssertionError) as e:
                return getattr(e, "kind", "wrong result"), launches
        return None, launches

    return run


def needs(op):
    if op not in kernels.MODULES:
        pytest.skip(f"there is no Triton kernel of {op}")


def planted(kind, launches, count):
    """Some faults of a kind in lines that run, of all kernels of the case."""
    found = [
        (ptx, mutant)
        for ptx, name in launches.forms.items()
        for mutant in mutants(ptx, name)
        if mutant.kind == kind and mutant.line in launches.lines[ptx]
    ]
    return random.Random(0).sample(found, min(count, len(found)))


def all_of(kind, name, ptx, where=lambda line: True):
    """The PTX with every fault of a kind planted in the kernel's lines that `where` says."""
    lines = ptx.split("\n")
    for mutant in mutants(ptx, name):
        if mutant.kind == kind and where(mutant.old):
            lines[mutant.line - 1] = mutant.new
    return "\n".join(lines)


FAULTS = (
    "barrier removed",
    "wait removed",
    "load or store moved",
    "fragments swapped",
    "bound off by one",
    "guard lost",
    "selection swapped",
)


@pytest.mark.parametrize("case", CASES)
def test_planted_faults_are_caught(case, emulator):
    op, check = CASES[case]
    needs(op)
    caught, intact = emulator(check)
    assert caught is None
    for kind in FAULTS:
        for ptx, mutant in planted(kind, intact, 2):
            caught, launches = emulator(check, lambda _, text: mutant.plant(text) if text == ptx else text)  # noqa: B023
            assert caught or launches.alike(intact), f"not noticed: {mutant}"


@pytest.mark.parametrize(
    ("kind", "caught"),
    [
        ("barrier removed", {"race", "never written"}),
        ("wait removed", {"never written"}),
        ("load or store moved", {"out of bounds", "misaligned access", "never written", "wrong result"}),
        ("fragments swapped", {"wrong result"}),
        ("bound off by one", {"out of bounds", "never written", "step limit", "wrong result"}),
        ("comparison inverted", {"out of bounds", "never written", "step limit", "wrong result"}),
        ("guard lost", {"out of bounds", "race", "wrong result"}),
        ("selection swapped", {"out of bounds", "never written", "step limit", "wrong result"}),
    ],
)
def test_all_faults_of_a_kind(kind, caught, emulator):
    check = CASES["target_attention"][1]
    needs("target_attention")
    _, intact = emulator(check)

    def faulty(name, ptx):
        return all_of(kind, name, ptx)

    assert any(faulty(name, ptx) != ptx for ptx, name in intact.forms.items())
    assert emulator(check, faulty)[0] in caught


def test_lost_scale(emulator):
    """The scale is the forward kernel's only fp32 argument; 1 in its place."""
    needs("target_attention")

    def without_scale(name, ptx):
        scale = re.findall(r"\.param \.(?:f32|b32) (\w+)", ptx)
        return re.sub(rf"ld\.param\.[bf]32(\s+%\w+), \[({'|'.join(scale)})\];", keep_or_one, ptx)

    def keep_or_one(match):
        return f"mov.b32{match[1]}, 0f3F800000;" if match[2] == factor else match[0]

    _, intact = emulator(CASES["target_attention"][1])
    for ptx in intact.forms:
        factors = re.findall(r"\.param \.f32 (\w+)", ptx)
        assert len(factors) <= 1
        factor = factors[0] if factors else None
    assert factor
    caught, _ = emulator(CASES["target_attention"][1], without_scale)
    assert caught == "wrong result"


def far_apart(rows, dim, distance):
    """Rows that lie `distance` elements apart, in memory that takes no room where it is not touched."""

    size = (rows - 1) * distance + dim
    untouched = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's, by name from Python 3.13 on
    memory = mmap.mmap(-1, 2 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | untouched)
    return torch.frombuffer(memory, dtype=BF16).as_strided((rows, 1, dim), (distance, dim, 1))


def test_addresses_of_32_bits(emulator):
    """Events that lie further from the first than 32 bits can say; then the products of addresses cut."""
    needs("target_attention")
    batch = make_jagged([5], [80], heads=1, dim=64, dtype=BF16)
    key, value = (far_apart(80, 64, 1 << 25).copy_(x) for x in (batch.key, batch.value))
    options = {"scale": 64**-0.5}

    def check():
        got, _ = attnrec.target_attention(
            batch.query, key, value, *batch.args[3:], return_lse=True, **options
        )
        want, _ = attnrec.reference.target_attention(*batch.args, **options)
        torch.testing.assert_close(got.float(), want.float(), atol=0.02, rtol=0.02)

    caught, intact = emulator(check)
    assert caught is None

    def of_32_bits(name, ptx):
        return all_of("32-bit address", name, ptx, lambda line: line.lstrip().startswith("mul.lo.s64"))

    assert any(of_32_bits(name, ptx) != ptx for ptx, name in intact.forms.items())
    assert emulator(check, of_32_bits)[0] in ("out of bounds", "wrong result")
