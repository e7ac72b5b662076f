"""Launch parameters: the tables are complete, looked up as documented, and rewritten by measurements only."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from attnrec.kernels import aot, launch, tune
from attnrec.kernels.aot_cases import OPS
from attnrec.kernels.launch import NATIVE_HEAD_DIMS, Launch, forced, parameters
from attnrec.kernels.standin import stand_in
from triton import knobs

ARCHS = launch.tables()
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BACKWARD_ROWS = "target_attention_backward_rows"
NOT_TRAITS = ("dtype", "head_dim", "launch", "why")


def traits_of(entries):
    """Every combination of values that the entries' traits could meet, an unknown one among them."""
    found = [{}]
    for name in sorted({key for entry in entries for key in entry if key not in NOT_TRAITS}):
        found = [combined | {name: value} for combined in found for value in (False, True)]
    return found


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_has_parameters_for_every_call(arch):
    for kernel, entries in launch.table(arch).items():
        used = set()
        for head_dim in NATIVE_HEAD_DIMS:
            for dtype in DTYPES:
                for traits in traits_of(entries):
                    found = parameters(kernel, head_dim=head_dim, dtype=dtype, arch=arch, **traits)
                    # block_n is 0 where a kernel takes that of another one.
                    assert found.block_m >= 1
                    assert found.num_warps >= 1
                    assert all(n & (n - 1) == 0 for n in found[:3]), (kernel, found)
                    assert 1 <= found.num_stages <= 5
                    used.add(
                        next(n for n, e in enumerate(entries) if launch.fits(e, head_dim, dtype, traits))
                    )
        assert used == set(range(len(entries))), f"{kernel}: entries that no call reaches"


@pytest.mark.parametrize("arch", ARCHS)
def test_every_entry_says_why(arch):
    for kernel, entries in launch.table(arch).items():
        for entry in entries:
            assert len(entry["why"]) > 5, (kernel, entry)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_batchs_sizes_change_only_the_height_of_tiles(arch):
    """A row's sums are taken in an order that the width of a tile and the warps that share it decide."""
    for kernel, entries in launch.table(arch).items():
        for head_dim in NATIVE_HEAD_DIMS:
            for dtype in DTYPES:
                by_options = {}
                for traits in traits_of(entries):
                    options = tuple(item for item in traits.items() if item[0] not in launch.SIZES)
                    found = parameters(kernel, head_dim=head_dim, dtype=dtype, arch=arch, **traits)
                    by_options.setdefault(options, set()).add(found)
                for options, different in by_options.items():
                    assert len({found.block_n for found in different}) == 1, (kernel, head_dim, options)
                    if len({found[:3] for found in different}) > 1:
                        # A warp has 16 rows, or four have 64 (wgmma; a lower tile would have mma.sync).
                        low = 16 if arch < 90 else 64
                        rows = [(found.block_m, max(16 * found.num_warps, low)) for found in different]
                        assert all(m % of_warps == 0 for m, of_warps in rows), (kernel, head_dim, different)


@pytest.mark.skipif(knobs.runtime.interpret, reason="Triton interprets in this process, and compiles nothing")
@pytest.mark.parametrize("head_dim", [16, 32])
def test_warps_do_not_share_columns_where_tiles_have_different_heights(head_dim):
    case = {name: values[0] for name, values in OPS["target_attention"].axes.items()} | {"head_dim": head_dim}
    heights = set()
    for history in OPS["target_attention"].axes["history"]:
        for launched in aot.launches(80, "target_attention", case | {"history": history}):
            if aot.kernel_name(launched) == "target_attention._forward":
                heights.add(launched.metadata.num_warps)
                code = launched.file("ttgir").read_text()
                layouts = re.findall(r"nvidia_mma<.*?warpsPerCTA = \[(\d+), (\d+)\]", code)
                assert layouts
                assert {columns for _, columns in layouts} == {"1"}
    assert heights == {2, 4}


@pytest.mark.parametrize("arch", ARCHS)
def test_registers_are_limited_where_the_launch_heeds_it(arch):
    limited = {
        (name, e["dtype"]) for name, of in launch.table(arch).items() for e in of if len(e["launch"]) > 4
    }
    heeded = {("target_attention", "half"), *((BACKWARD_ROWS, dtype) for dtype in ("half", "float32"))}
    assert limited <= heeded


def test_the_tables_have_the_same_kernels():
    assert len({tuple(sorted(launch.table(arch))) for arch in ARCHS}) == 1


@pytest.mark.parametrize(("arch", "like"), [(86, 80), (89, 80), (103, 100), (120, 100)])
def test_an_architecture_without_a_table_takes_the_nearest_lower_one(arch, like):
    assert arch not in ARCHS
    assert launch.table_path(arch) == launch.table_path(like)


def test_an_architecture_that_is_too_old_is_refused():
    with pytest.raises(LookupError, match=r"sm_75: the kernels need at least sm_80"):
        parameters("target_attention", head_dim=64, dtype=torch.float16, arch=75)


@pytest.mark.parametrize(
    ("head_dim", "native"), [(1, 16), (16, 16), (17, 32), (40, 64), (64, 64), (200, 256)]
)
def test_other_head_dims_take_the_next_native_one(head_dim, native):
    assert launch.native_head_dim(head_dim) == native
    same = {"dtype": torch.bfloat16, "arch": 80, "visible": False, "bias": False}
    assert parameters("target_attention", head_dim=head_dim, **same) == parameters(
        "target_attention", head_dim=native, **same
    )


def test_what_the_table_lacks_is_named():
    with pytest.raises(LookupError, match=r"no kernel 'nothing'; it has .*target_attention"):
        parameters("nothing", head_dim=64, dtype=torch.float16, arch=80)
    with pytest.raises(LookupError, match=r"no entry for target_attention with head dim 300"):
        parameters("target_attention", head_dim=300, dtype=torch.float16, arch=80)


def test_the_architecture_is_the_active_driver_s():
    for arch in (80, 90):
        with stand_in(arch, lambda launched: None):
            assert launch.arch() == arch
            assert launch.cpu_tensors_allowed
    assert not launch.cpu_tensors_allowed


def test_the_interpreter_is_sm_80():
    code = "from attnrec.kernels import launch; print(launch.arch())"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == "80"


def test_forced_parameters_hold_only_inside():
    call = {"head_dim": 64, "dtype": torch.bfloat16, "arch": 80}
    before, other = parameters("target_attention", **call), Launch(16, 16, 1, 1)
    with forced("target_attention", other):
        assert parameters("target_attention", **call) == other
        assert parameters("target_attention_top", **call) != other
    assert parameters("target_attention", **call) == before


# --- tune ---------------------------------------------------------------------------------------------------

SMALL, LARGE, WIDE = Launch(64, 32, 4, 2), Launch(128, 64, 4, 3), Launch(64, 64, 4, 3)


def test_choose_takes_the_cheapest_that_is_sound():
    costs = {SMALL: 3.0, LARGE: 1.0, WIDE: 2.0}
    best, cost, others = tune.choose(
        costs, costs.get, lambda launch: "spills 8 bytes" if launch == LARGE else None
    )
    assert (best, cost) == (WIDE, 2.0)
    assert "spills 8 bytes" in others
    assert str(list(SMALL)) in others


def test_choose_leaves_out_what_cannot_be_measured():
    assert tune.choose([SMALL, LARGE], {SMALL: 5.0}.get, lambda launch: None)[0] == SMALL
    assert tune.choose([SMALL], lambda launch: None, lambda launch: None) is None
    assert tune.choose([SMALL], lambda launch: 1.0, lambda launch: "spills") is None


def test_retuned_keeps_the_rest_of_an_entry(monkeypatch):
    """A fake timer, which likes one tile at head dim 64 and another at 128."""
    monkeypatch.setattr(tune, "why_unsound", lambda name, launch, arch, cases: None)
    entry = {"dtype": "half", "head_dim": [64, 128], "visible": False, "launch": list(WIDE), "why": "x"}
    liked = {64: tune.MATRIX[64][0], 128: tune.MATRIX[128][-1]}

    def measure_of(name, entry, head_dim):
        return lambda launch: 1.0 if launch == liked[head_dim] else 2.0

    found = tune.retuned("target_attention", [entry], measure_of, 80, "measured on a clock")
    assert [e["head_dim"] for e in found] == [[64], [128]]
    assert [e["launch"] for e in found] == [list(liked[64]), list(liked[128])]
    assert all(e["visible"] is False and e["why"].startswith("measured on a clock: 1") for e in found)


def test_a_candidate_that_spills_is_unsound():
    """Exact float32 products of 64 x 64 tiles do not fit into registers at head dim 256."""
    entry = {"dtype": "half", "head_dim": [256]}
    case = next(iter(tune.cases_of("target_attention", entry, 256)))
    why = tune.why_unsound("target_attention", Launch(128, 128, 4, 1), 80, [case])
    assert why is not None
    assert "spills" in why or "shared memory" in why


def test_cases_of_an_entry_follow_its_traits():
    general, plain = (
        {"dtype": "half", "head_dim": [64]},
        {"dtype": "half", "head_dim": [64], "visible": False, "bias": False},
    )
    full = list(tune.cases_of("target_attention", general, 64))[-1]
    assert full["visible"]
    assert full["bias"] != "none"
    assert full["self"]
    full = list(tune.cases_of("target_attention", plain, 64))[-1]
    assert not full["visible"]
    assert full["bias"] == "none"
    assert full["self"]
    for sizes, history in (
        ({"one_chunk": True, "few_rows": True}, "short"),
        ({"one_chunk": True}, "short, full"),
        ({"few_rows": False}, "short, full"),
    ):
        cases = list(tune.cases_of("target_attention", general | sizes, 64))
        assert {case["history"] for case in cases} == {history}
    dtypes = {case["dtype"] for case in tune.cases_of("target_attention", general | {"dtype": "float32"}, 64)}
    assert dtypes == {"float32", "tf32"}


def test_what_is_written_is_what_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "TABLES", tmp_path)
    kernels = dict(launch.table(80))
    tune.write(80, kernels)
    text = (tmp_path / "sm_80.json").read_text()
    assert json.loads(text) == kernels
    assert text.count('"launch"') == len([line for line in text.splitlines() if '"launch"' in line])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_tune_refuses_without_a_gpu(capsys):
    before = {arch: launch.table_path(arch).read_text() for arch in ARCHS}
    assert tune.main([]) == 1
    assert "GPU" in capsys.readouterr().err
    assert before == {arch: launch.table_path(arch).read_text() for arch in ARCHS}


def test_every_tuned_kernel_is_in_the_tables():
    assert set(tune.OP_OF) <= set(launch.table(80))
