"""The ahead-of-time compiler: its cases, what it reads from a compiled kernel, what it objects to."""

from itertools import combinations, product
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from attnrec.kernels import MODULES, aot, launch  # noqa: E402
from attnrec.kernels.aot_cases import OPS, RISKIEST, covering, riskiest, whole  # noqa: E402
from attnrec.kernels.launch import Launch, forced  # noqa: E402
from attnrec.kernels.standin import stand_in  # noqa: E402

from attnrec import ops  # noqa: E402

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="Triton interprets in this process, and compiles nothing"
)


@triton.jit
def square(x, y, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    a = tl.load(x + at)
    tl.store(y + at, tl.dot(a, a, input_precision=PRECISION).to(a.dtype))


def compiled(arch, dtype, precision="ieee", block=64):
    found = []
    x = torch.zeros(block, block, dtype=dtype)
    with stand_in(arch, found.append):
        square[(2, 3)](x, x, precision, block)
    (launched,) = found
    assert launched.grid == (2, 3, 1)
    return aot.describe(launched, arch, "square", {"dtype": str(dtype)})


@pytest.mark.parametrize(
    ("arch", "instruction"), [(80, "mma.sync"), (90, "wgmma.mma_async"), (100, "tcgen05.mma")]
)
def test_a_row_says_what_was_compiled(arch, instruction):
    row = compiled(arch, torch.bfloat16)
    assert (row["kernel"], row["op"], row["arch"]) == ("test_kernels_aot.square", "square", arch)
    assert row["matrix"] == [instruction]
    assert row["products"] == ["bf16"]
    assert row["options"] == {"PRECISION": "ieee", "BLOCK": 64, "num_warps": 4, "num_stages": 3}
    assert 0 < row["registers"] <= 255
    assert row["shared_bytes"] >= 64 * 64 * 2
    assert row["spills"] == 0
    assert aot.offence(row) is None


def test_a_spill_is_an_offence():
    """An exact product of 64 x 64 float32 tiles needs more registers than there are."""
    row = compiled(80, torch.float32)
    assert row["spills"] > 0
    assert row["products"] == ["f32"]
    assert aot.offence(row) == f"spills {row['spills']} bytes a thread"


def test_tf32_is_a_product_that_wants_a_matrix_instruction():
    row = compiled(80, torch.float32, "tf32", 32)
    assert row["products"] == ["tf32"]
    assert row["matrix"] == ["mma.sync"]
    assert "without a matrix instruction" in aot.offence(row | {"matrix": [], "spills": 0})
    assert aot.offence(row | {"matrix": [], "products": ["f32"], "spills": 0}) is None


def test_shared_memory_is_held_against_the_chip():
    row = compiled(90, torch.bfloat16) | {"shared_bytes": 200 << 10}
    assert aot.offence(row) is None
    assert "sm_80 has 166912" in aot.offence(row | {"arch": 80})


def test_registers_are_held_against_the_chip():
    """A launch of more fails; `maxnreg` lets ptxas give a thread more than its block can have."""
    row = compiled(80, torch.bfloat16)
    assert "170 registers a thread for 512 threads" in aot.offence(
        row | {"registers": 170, "options": row["options"] | {"num_warps": 16}}
    )
    assert aot.offence(row | {"registers": 170}) is None


def test_an_error_becomes_an_offence(monkeypatch):
    def broken(op):
        raise ValueError("no\nsuch tile")

    monkeypatch.setattr(aot, "kernel", broken)
    case = covering(OPS["softmax_score"].axes)[0]
    (row,) = aot.compile_case((80, "softmax_score", case))
    assert aot.offence(row) == "ValueError: such tile"


def test_the_products_of_an_ir():
    half = "%4 = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<64x32xf16> * tensor<32x64xf16> -> x"
    tf32 = "%4 = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<64x32xf32> * tensor<32x64xf32> -> x"
    exact = "%4 = tt.dot %a, %b, %c : tensor<64x32xf32> * tensor<32x64xf32> -> x"
    assert aot.products("\n".join([half, tf32, exact, "%5 = tt.load %x"])) == {"f16", "tf32", "f32"}


@pytest.mark.parametrize("op", OPS)
def test_covering_cases_have_every_pair(op):
    axes, legal = OPS[op].axes, OPS[op].legal
    cases = covering(axes, legal)
    assert all(map(legal, cases))
    assert all(list(case) == list(axes) for case in cases)
    for a, b in combinations(axes, 2):
        seen = {(case[a], case[b]) for case in cases}
        possible = {
            (x, y)
            for x, y in product(axes[a], axes[b])
            if legal({axis: values[0] for axis, values in axes.items()} | {a: x, b: y})
        }
        assert possible <= seen, (a, b)
    assert len(cases) < 40
    assert cases == covering(axes, legal)


@pytest.mark.parametrize("op", OPS)
def test_the_whole_set_has_every_dtype_and_head_dim(op):
    axes = OPS[op].axes
    cases = whole(OPS[op])
    assert {(c["dtype"], c["head_dim"]) for c in cases} == set(product(axes["dtype"], axes["head_dim"]))
    assert len({tuple(c.items()) for c in cases}) == len(cases)


@pytest.mark.parametrize("op", OPS)
def test_the_riskiest_cases_have_every_value(op):
    axes = OPS[op].axes
    cases = riskiest(OPS[op])
    assert all(map(OPS[op].legal, cases))
    assert {(c["dtype"], c["head_dim"]) for c in cases} == set(RISKIEST)
    for name, values in axes.items():
        if name not in ("dtype", "head_dim"):
            assert {c[name] for c in cases} == set(values), name
    assert len(cases) <= 5


@pytest.mark.parametrize("op", OPS)
def test_arguments_are_those_of_the_op(op):
    """What is compiled is called as the op is called."""
    registered = ops.OPS[op]
    for case in covering(OPS[op].axes, OPS[op].legal):
        arguments = OPS[op].arguments(case)
        assert set(arguments) <= set(registered.names)
        registered.check(True, **registered.defaults | arguments)


def test_tasks_of_the_subset_spread_over_the_architectures():
    todo = aot.tasks([80, 90, 100], ["softmax_score", "catalog_topk"], subset="pairs")
    assert {op for _, op, _ in todo} == {"softmax_score", "catalog_topk"}
    for op in ("softmax_score", "catalog_topk"):
        dtypes = {(arch, case["dtype"]) for arch, o, case in todo if o == op}
        assert dtypes == set(product((80, 90, 100), OPS[op].axes["dtype"]))
    assert "arch" not in todo[0][2]


def test_every_op_with_a_kernel_is_compiled():
    assert set(MODULES) <= set(OPS)


def test_the_command_fails_on_an_offender(monkeypatch, tmp_path, capsys):
    good = compiled(80, torch.bfloat16)
    file = tmp_path / "rows.json"
    for rows, code in (([good], 0), ([good, good | {"spills": 12, "hash": "other"}], 1)):
        monkeypatch.setattr(aot, "compile_all", lambda todo, jobs, progress, journal, rows=rows: rows)
        assert aot.main(["--arch", "80", "--subset", "--json", str(file)]) == code
        assert ("spills 12 bytes" in capsys.readouterr().out) == bool(code)
    assert '"spills": 12' in file.read_text()


def test_the_command_fails_on_a_tile_that_spills(capsys):
    """Of the project's own kernels, from the tasks to the exit status."""
    command = [
        "--arch",
        "80",
        "--op",
        "softmax_score",
        "--subset",
        "riskiest",
        "--dtype",
        "float32",
        "--jobs",
        "1",
    ]
    with forced("softmax_score", Launch(1, 2048, 1, 1)):
        assert run_here(command) == 1
    assert "spills" in capsys.readouterr().out
    assert run_here(command) == 0
    assert "1 of" not in capsys.readouterr().out


def test_a_journal_goes_on_where_a_run_was_stopped(monkeypatch, tmp_path):
    """What is in it is not compiled again, unless it was compiled from other sources."""
    journal, compiled_now = tmp_path / "journal", []
    todo = aot.tasks([80], ["softmax_score"], subset="riskiest")

    class Here:
        """A pool of this process, stopped at the third case."""

        def __init__(self, *arguments, **keywords):
            pass

        __enter__, __exit__ = lambda self: self, lambda self, *error: None

        def map(self, function, tasks):
            for task in tasks:
                if len(compiled_now) == 2:
                    raise KeyboardInterrupt
                compiled_now.append(task)
                yield [{"hash": str(task)}, {"hash": "of all"}]

    monkeypatch.setattr(aot, "ProcessPoolExecutor", Here)
    with pytest.raises(KeyboardInterrupt):
        aot.compile_all(todo, 1, lambda done, total: None, journal)
    with journal.open("a") as file:
        file.write('{"task": [80, "softm')  # as a run leaves it that is ended while it writes
    assert compiled_now == todo[:2]

    compiled_now.clear()
    steps = []
    rows = aot.compile_all(todo[:3], 1, lambda *step: steps.append(step), journal)
    assert compiled_now == todo[2:3]
    assert steps == [(3, 3)]
    assert [row["hash"] for row in rows] == [str(todo[0]), "of all", *map(str, todo[1:3])]

    compiled_now.clear()
    assert aot.compile_all(todo[:3], 1, lambda *step: None, journal) == rows
    assert not compiled_now
    monkeypatch.setattr(aot, "sources", lambda task: "others")
    aot.compile_all(todo[:2], 1, lambda *step: None, journal)
    assert compiled_now == todo[:2]


def test_a_change_recompiles_what_it_may_concern(monkeypatch):
    """A journal's rows stand as long as the op's own files do, and what the table says of the case."""
    half, single = {"dtype": "bfloat16", "head_dim": 64}, {"dtype": "float32", "head_dim": 64}
    tasks = [
        (80, "target_attention", half), (80, "target_attention", single), (90, "target_attention", half),
        (80, "target_attention_top", half), (80, "catalog_topk", half),
    ]  # fmt: skip

    def changed(owner, name, value):
        before = [aot.sources(task) for task in tasks]
        assert len(set(before)) == len(tasks)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            aot._sources.cache_clear()
            after = [aot.sources(task) for task in tasks]
        aot._sources.cache_clear()
        return [a != b for a, b in zip(after, before, strict=True)]

    read, written = Path.read_text, launch.table

    def edited(*names):
        return lambda file: read(file) + "#" * (file.name in names)

    assert changed(Path, "read_text", edited("target_attention.py")) == [True, True, True, False, False]
    assert changed(Path, "read_text", edited("selection.py")) == [False, False, False, True, True]
    assert changed(Path, "read_text", edited("streaming.py")) == [True] * 5
    assert changed(Path, "read_text", edited("aot.py")) == [True] * 5
    assert changed(Path, "read_text", edited("catalog_cross_entropy.py")) == [False] * 5

    def moved(arch):
        """Another tile for target_attention in half precision at D = 64 on sm_80."""
        kernels = dict(written(arch))
        if arch == 80:
            kernels["target_attention"] = [
                entry | {"launch": [1, 1, 1, 1]}
                if entry["dtype"] == "half" and 64 in entry["head_dim"]
                else entry
                for entry in kernels["target_attention"]
            ]
        return kernels

    assert changed(aot, "table", moved) == [True, False, False, False, False]


def run_here(command):
    """`aot.main` with the cases compiled in this process, which knows what is forced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            aot,
            "compile_all",
            lambda todo, jobs, progress, journal: [row for t in todo for row in aot.compile_case(t)],
        )
        return aot.main(command)


def test_a_real_op_has_nothing_to_object_to():
    case = {name: values[0] for name, values in OPS["target_attention"].axes.items()} | {"head_dim": 32}
    rows = aot.compile_case((80, "target_attention", case))
    assert [aot.offence(row) for row in rows] == [None] * len(rows)
    assert any(row["matrix"] == ["mma.sync"] for row in rows)
