"""The contract suite's own check catches faults planted in the compiled PTX of the project's kernels.

In each pass, forward and backward, of each op and for each kind of fault: some that can be planted in
lines of its kernels that run. Each is caught, by the emulator or by the comparison with the reference, or no
result changes (Triton emits waits that others cover, and guards that are true), and of each kind some are
caught. ATTNREC_TEST_FULL=1 plants more; the mutation command (mutate.py) does it at large.
"""

import mmap
import os
import random
from functools import partial

import helpers
import pytest
import torch
from helpers import OPTIONS, assert_matches_reference, make_jagged, make_offsets, outputs_and_grads

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("compiled code is executed, and this process interprets", allow_module_level=True)

from ptxemu import PtxError, session
from ptxemu.mutations import EQUIVALENT, mutants, source_lines

import attnrec

BF16 = torch.bfloat16
FULL = os.environ.get("ATTNREC_TEST_FULL") == "1"
AT_LEAST = 12 if FULL else 1  # faults of a kind in a kernel, and more until one is caught


def below_zero(rows, *events):
    """Scores of all pairs far below 0, where what is masked has 0: one pair too many outweighs all."""
    for x, value in zip((rows, *events), (6.0, *[-6.0] * len(events)), strict=True):
        x[..., 0] = value


def far_apart(x):
    """The same rows further from the first than 32 bits can say, in memory that takes no room where it is not
    touched."""
    rows, *others = x.shape
    distance = (5 << 29) // rows // 8 * 8
    size = (rows - 1) * distance + x[0].numel()
    untouched = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's, by name from Python 3.13 on
    memory = mmap.mmap(-1, x.itemsize * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | untouched)
    strides = distance, *x[0].contiguous().stride()
    return torch.frombuffer(memory, dtype=x.dtype).as_strided((rows, *others), strides).copy_(x)


def attention(name, *args, rows=(17, 0, 9), events=(70, 17, 100), differentiate=(), far=False, **changes):
    batch = make_jagged(rows, events, **{"heads": 2, "dtype": BF16, **changes})
    below_zero(batch.query, batch.key, *([] if batch.self_key is None else [batch.self_key]))
    if far:
        batch = batch.with_(key=far_apart(batch.key), value=far_apart(batch.value))
    weights = name != "target_attention"
    args = [*(batch.weights_args if weights else batch.args), *args]
    options = batch.weights_options if weights else batch.options
    return partial(assert_matches_reference, name, *args, differentiate=differentiate, **options)


def catalog(name, *args, rows=20, items=300, dim=64, differentiate=(), far=False, **options):
    generator = torch.Generator().manual_seed(0)
    users, table = (torch.randn(n, dim, generator=generator).to(BF16) for n in (rows, items))
    below_zero(users, table)
    target = torch.randint(0, items, (rows,), generator=generator)
    args = [target if x == "ids" else x for x in args]
    options = {key: target if x == "ids" else x for key, x in options.items()}
    # Probabilities neither of one size, where rows could be swapped, nor so different that the small ones
    # would not matter.
    options |= {"temperature": 3.0, "differentiate": differentiate}
    table = far_apart(table) if far else table
    return partial(assert_matches_reference, name, users, table, *args, **options)


CANDIDATES = make_offsets([120, 0, 7, 173])
CASES = {  # name -> (makes a case, with what), each op forward and backward
    "target_attention": (attention, "target_attention", {"options": OPTIONS, "dim": 64, "kv_heads": 1}),
    "target_attention_backward": (
        attention, "target_attention", {"options": OPTIONS, "dim": 32, "kv_heads": 1, "differentiate": (0, 1)}
    ),
    "target_attention_weights": (attention, "target_attention_weights", {"dim": 32, "options": ["key_bias"]}),
    "target_attention_top": (attention, "target_attention_top", 10, {"dim": 32}),
    "softmax_score": (catalog, "softmax_score", CANDIDATES, {"rows": 4}),
    "softmax_score_backward": (catalog, "softmax_score", CANDIDATES, {"rows": 4, "differentiate": (0,)}),
    "catalog_topk": (catalog, "catalog_topk", 5, {"rows": 3, "items": 2500, "dim": 32}),
    "catalog_cross_entropy": (catalog, "catalog_cross_entropy", "ids", {}),
    "catalog_cross_entropy_backward": (catalog, "catalog_cross_entropy", "ids", {"differentiate": (0,)}),
    "catalog_cross_entropy_backward, negatives": (
        catalog, "catalog_cross_entropy", "ids", {"negatives": "ids", "in_batch": True, "differentiate": (0,)}
    ),
}  # fmt: skip
OF_FORWARD = {"_forward", "_log_sums", "_losses", "_score", "_weigh"}


def check_of(case, **changes):
    """Of one of the CASES."""
    make, *args, options = case
    return make(*args, **{**options, **changes})


def kernels_of(case, launches):
    """The names of the kernels of the case's own pass."""
    return sorted(set(launches.forms.values()) - (OF_FORWARD if "backward" in case else set()))


class Launches:
    """The forms of the kernels that run, their lines that run, and the results of the op."""

    def __init__(self):
        self.forms, self.lines, self.results = {}, {}, []

    def __call__(self, call, stats, before):
        self.forms[call.compiled] = call.name
        self.lines[call.compiled] = self.lines.get(call.compiled, set()) | stats.lines

    def keep(self, function, *args, **kwargs):
        outputs, grads = outputs_and_grads(function, *args, **kwargs)
        self.results += [x.detach().clone() for x in (*outputs, *grads.values())]
        return outputs, grads

    def alike(self, other):
        """Whether no result differs by more than a rounding step of its largest value (1 item too many of 300
        is less than bf16 can tell), or four in fp32: a softmax relative to another score than the largest one
        is the same softmax."""
        for x, y in zip(self.results, other.results, strict=True):
            step = max(torch.finfo(x.dtype).eps, 2.0**-21) if x.is_floating_point() else 0
            finite = x.isfinite() & y.isfinite()
            x_, y_ = x[finite].double(), y[finite].double()
            if x_.numel() and (x_ - y_).abs().max() > step * x_.abs().max():
                return False
            if not torch.equal(x[~finite], y[~finite]):
                return False
        return True


def emulator_of(backend, served, monkeypatch):
    """run(check, edit) -> (what caught it or None, Launches). Each launch in lockstep only: that is the quick
    part, and what it catches the whole catches too."""

    def run(check, edit=None):
        launches = Launches()
        monkeypatch.setattr(session, "observe", launches)
        monkeypatch.setattr(helpers, "outputs_and_grads", launches.keep)
        monkeypatch.setattr(session, "edit", edit)
        monkeypatch.setattr(session, "MOST", 0)
        monkeypatch.setattr(session, "max_steps", 100_000)
        with served(), attnrec.use_backend(backend):
            try:
                check()
            except (PtxError, AssertionError) as e:
                return getattr(e, "kind", "wrong result"), launches
        return None, launches

    return run


@pytest.fixture
def emulator(monkeypatch):
    return emulator_of("triton", session.session, monkeypatch)


def planted(kind, launches, kernel):
    """The faults of a kind in lines of the kernel that run, in random order."""
    found = [
        (ptx, mutant)
        for ptx, name in launches.forms.items()
        if name == kernel
        for mutant in mutants(ptx, name)
        if mutant.kind == kind and mutant.line in launches.lines[ptx]
    ]
    return random.Random(0).sample(found, len(found))


FAULTS = (
    "barrier removed",
    "wait removed",
    "load or store moved",
    "fragments swapped",
    "bound off by one",
    "guard lost",
    "selection swapped",
    "argument lost",
)


def edited(wanted, change):
    """What gives `change(ptx)` for the PTX `wanted`, and others as they are."""
    return lambda name, ptx: change(ptx) if ptx == wanted else ptx


def assert_faults_are_caught(check, emulator, kernels):
    """Those of FAULTS; `kernels(launches)` names the kernels."""
    caught, intact = emulator(check)
    assert caught is None
    for kind in FAULTS:
        by_what = []
        for kernel in kernels(intact):
            for count, (ptx, mutant) in enumerate(planted(kind, intact, kernel), 1):
                caught, launches = emulator(check, edited(ptx, mutant.plant))
                assert caught or launches.alike(intact), f"not noticed in {kernel}: {mutant}"
                by_what.append(caught)
                if any(by_what) and count >= AT_LEAST:  # of this kernel, or one of this and some of another
                    break
        assert any(by_what) or not by_what, f"{kind}: none of {len(by_what)} is noticed"


@pytest.mark.parametrize("case", CASES)
def test_planted_faults_are_caught(case, emulator):
    assert_faults_are_caught(check_of(CASES[case]), emulator, partial(kernels_of, case))


FAR = {case: {} for case in CASES if "negatives" not in case}
FAR |= {case: {"options": ()} for case in FAR if case.startswith("target_attention")}
FAR["catalog_topk"] = {"items": 300}


def assert_addresses_have_64_bits(check, emulator, kernels):
    """With all products of addresses cut to 32 bits, in one kernel at a time."""
    caught, intact = emulator(check)
    assert caught is None
    by_what = []
    for kernel in kernels(intact):

        def cut(name, ptx, kernel=kernel):
            lines = ptx.split("\n")
            for mutant in mutants(ptx, name) if name == kernel else ():
                if mutant.kind == "32-bit address":
                    lines[mutant.line - 1] = mutant.new
            return "\n".join(lines)

        caught, launches = emulator(check, cut)
        assert caught or launches.alike(intact), f"not noticed in {kernel}"
        by_what.append(caught)
    assert {"out of bounds", "wrong result"} & set(by_what)


@pytest.mark.parametrize("case", FAR)
def test_addresses_of_32_bits(case, emulator):
    """Events and items that lie further from the first than 32 bits can say."""
    check = check_of(CASES[case], far=True, **FAR[case])
    assert_addresses_have_64_bits(check, emulator, partial(kernels_of, case))


def test_the_list_of_equivalent_faults_names_lines_that_exist():
    for group in EQUIVALENT:
        for entry in group["mutants"]:
            if "source" in entry:
                file, _, text = entry["source"].partition(": ")
                assert text in source_lines(file), entry
