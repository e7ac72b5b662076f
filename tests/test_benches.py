"""The benchmark runner: its JSON is whole, a wrong result has no speed, and what it counts is right.

Never a time: how fast something was says nothing in a test.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attnrec
from benches import compare, measure, registry, run, tables
from benches.__main__ import main
from benches.case import Case, Contender, Counts, Refused
from benches.case import compare as hold_against
from benches.machine import Floors, describe, line, measure_floors
from benches.measure import enough, interleaved, peak_memory, quantile, times
from benches.run import OURS, fastest_peer, run_case

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


# --- the whole run ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke():
    """`python -m benches --suite smoke --json`, as a user starts it."""
    options = ["--suite", "smoke", "--json", "--seconds", "0", "--threads", "1"]
    command = [sys.executable, "-m", "benches", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_smoke_has_a_right_row_of_every_op(smoke):
    assert {row["op"] for row in smoke["rows"]} == set(registry.OPS)
    cases = registry.select(registry.all_cases(), suite="smoke")
    assert [row["case"] for row in smoke["rows"]] == [case.name for case in cases]
    for row in smoke["rows"]:
        assert not row["wrong"], (row["case"], row["wrong"])
        assert OURS in row["results"], row["case"]
        assert row["results"].keys() | row["refused"].keys() == {OURS, *_peers(cases, row)}


def _peers(cases, row):
    return next(case.peers for case in cases if (case.op, case.name) == (row["op"], row["case"]))


def test_rows_are_whole(smoke):
    for row in smoke["rows"]:
        assert row["reproduce"].startswith(f"python -m benches --op {row['op']} --case {row['case']}")
        assert row["sizes"]
        assert row["backend"]
        assert row["flops"] > 0
        assert row["bytes"] > 0
        assert row["floor_seconds"] > 0
        assert row["took"] > 0
        assert row["bound"] in ("matrix", "memory", "exponentials")
        for name, result in row["results"].items():
            assert 0 < result["p10"] <= result["seconds"] <= result["p90"], (row["case"], name)
            assert result["ratio"] > 0
            assert result["share"] > 0
            assert result["gflops"] > 0
            assert result["calls_per_sample"] >= 1
            assert result["error"] <= result["allowed"]
        assert row["results"][OURS]["ratio"] == 1
        assert all(reason for reason in row["refused"].values())


def test_the_json_names_machine_floors_and_command(smoke):
    assert smoke["schema"] == 1
    assert smoke["suite"] == "smoke"
    assert smoke["command"].startswith("python -m benches")
    machine = smoke["machine"]
    assert machine["cpu"]
    assert machine["torch"] == torch.__version__
    assert machine["threads"] >= 1
    assert isinstance(machine["dirty"], bool)
    assert machine["cpu"] in line(machine)
    floors = smoke["floors"]
    assert set(floors["flops"]) == {row["dtype"] for row in smoke["rows"]}
    assert floors["exps"] > 0
    assert all(rate > 0 for _, rate in floors["bandwidth"])


# --- a wrong result -----------------------------------------------------------------------------------------


class Planted:
    """A problem whose result is 1, 2, 3, and contenders with results of their own."""

    def __init__(self, mine):
        self.mine = mine

    def counts(self):
        return Counts(flops=6.0, bytes=24.0)

    def backend(self):
        return "planted"

    def ours(self):
        return Contender(lambda: torch.tensor(self.mine))

    def check(self, results, *, ours):
        exact = torch.tensor([1.0, 2.0, 3.0])
        return hold_against(results, [[exact]], [exact.double()], factors=[2.0], names=["out"])


def _refuses(problem):
    raise Refused("not installed")


def _raises(problem):
    raise RuntimeError("no kernel")


def _planted(mine, **peers):
    peers = {name: lambda problem, x=x: Contender(lambda: torch.tensor(x)) for name, x in peers.items()}
    return Case(
        "planted",
        "1/fp32",
        "smoke",
        "fp32",
        {"N": 3},
        lambda device: Planted(mine),
        peers | {"missing": _refuses, "broken": _raises},
    )


def _run(case):
    return run_case(case, CPU, threads=1, seconds=0.0)


def test_a_wrong_result_of_ours_has_no_speed():
    row = _run(_planted([1.0, 2.0, 3.1], peer=[1.0, 2.0, 3.0]))
    assert row["results"] == {}
    assert "error 1.00e-01" in row["wrong"][OURS]
    assert fastest_peer(row) is None
    assert ["WRONG" in text[2] for text in tables.lines(row)] == [True]


def test_a_nan_is_wrong():
    assert OURS in _run(_planted([1.0, float("nan"), 3.0]))["wrong"]


def test_a_wrong_peer_has_no_speed_and_the_others_have():
    row = _run(_planted([1.0, 2.0, 3.0], good=[1.0, 2.0, 3.0], wrong=[1.0, 2.0, 2.0], short=[1.0, 2.0]))
    assert row["results"].keys() == {OURS, "good"}
    assert row["wrong"].keys() == {"wrong", "short"}
    assert row["refused"] == {"missing": "not installed", "broken": "RuntimeError: no kernel"}


def test_a_peer_that_takes_too_long_is_not_timed(monkeypatch):
    monkeypatch.setattr(run, "LONGEST_CALL", -1.0)
    row = _run(_planted([1.0, 2.0, 3.0], slow=[1.0, 2.0, 3.0]))
    assert row["results"].keys() == {OURS}
    assert "a call takes more than" in row["refused"]["slow"]


def test_the_command_fails_where_ours_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(registry, "all_cases", lambda: [_planted([1.0, 2.0, 4.0])])
    assert main(["--suite", "smoke", "--json", "--threads", "1"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["rows"][0]["results"] == {}
    assert "no right result in 1/fp32" in captured.err


def test_the_rule_of_comparison():
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    plain = exact.float() + torch.tensor([0.0, 0.01])
    how = {"factors": [2.0], "names": ["out"]}
    last = torch.tensor([0.0, 1.0])
    assert hold_against([plain + 0.009 * last], [[plain]], [exact], **how).right
    assert not hold_against([plain + 0.012 * last], [[plain]], [exact], **how).right
    infinite = torch.tensor([1.0, -torch.inf])
    assert hold_against([infinite], [[infinite]], [infinite.double()], **how).right
    assert not hold_against([torch.tensor([1.0, 0.0])], [[infinite]], [infinite.double()], **how).right
    assert not hold_against([], [[plain]], [exact], **how).right


def test_the_rule_takes_the_worst_of_several_ways_of_plain_pytorch():
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    lucky, unlucky = exact.float(), exact.float() + torch.tensor([0.0, 0.01])
    how = {"factors": [2.0], "names": ["out"]}
    assert not hold_against([exact + 0.01], [[lucky]], [exact], **how).right
    assert hold_against([exact + 0.01], [[lucky], [unlucky]], [exact], **how).right


def test_the_rule_sees_a_small_error_of_all_elements():
    """Below the largest error of plain PyTorch, which is one element's."""
    exact = torch.ones(1000, dtype=torch.float64)
    plain = exact.float()
    plain[3] += 0.01
    verdict = hold_against([exact + 0.005], [[plain]], [exact], factors=[2.0], names=["out"])
    assert not verdict.right
    assert verdict.what == "out (mean)"


# --- measuring ----------------------------------------------------------------------------------------------


def test_contenders_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    found = interleaved(calls, CPU, sample=0.0, seconds=0.0)
    assert list(found) == ["a", "b", "c"]
    # A call each for the samples' size, then rounds that start in turns.
    assert "".join(order[:12]) == "abc" + "abc" + "bca" + "cab"


def test_rounds():
    assert not enough(4, 2.0, 1.0)
    assert enough(5, 2.0, 1.0)
    assert not enough(9, 0.5, 1.0)
    assert enough(3, 6.0, 1.0)
    assert not enough(2, 60.0, 1.0)


def test_ratio_is_taken_round_by_round():
    found = times([2.0, 40.0, 2.2], [1.0, 20.0, 1.1], 1)
    assert found.ratio == 2.0
    assert found.median == 2.2


class FakeGpu:
    """What `torch.cuda` is asked for, with a clock that each thing on the stream moves on."""

    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.now
                gpu.log.append("event")

            def elapsed_time(self, other):
                return (other.at - self.at) * 1e3

        class Cache:
            def zero_(self):
                gpu.work("flush", 10.0)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: gpu.log.append("synchronize"))
        monkeypatch.setattr(measure, "_twice_the_l2", lambda device: Cache())

    def work(self, name, seconds):
        self.log.append(name)
        self.now += seconds


def test_a_gpu_is_timed_by_events_with_a_cold_cache(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    seconds = iter([1.0, 2.0])
    found = measure.time_calls(lambda: gpu.work("call", next(seconds)), 2, torch.device("cuda"))
    assert found == pytest.approx(1.5)
    turn = ["flush", "event", "call", "event"]
    assert gpu.log == ["synchronize", *turn, *turn, "synchronize"]


def test_what_a_graph_does_not_capture_is_refused(monkeypatch):
    def capture(call, device):
        if call() == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return call

    monkeypatch.setattr(run, "captured", capture)
    row = {"refused": {}}
    found = run._captured({"a": lambda: 1, "b": lambda: 2}, CPU, row)
    assert found.keys() == {"a"}
    assert row["refused"] == {"b": "no CUDA graph: operation not permitted when stream is capturing"}


def test_quantile_as_numpy():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.1) == pytest.approx(1.0)
    assert quantile([5.0], 0.9) == 5.0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell")
def test_peak_memory_sees_what_is_freed_again():
    size = 64 << 20

    def call():
        scratch = torch.ones(size // 4)
        return scratch.sum()

    assert 0.9 * size < peak_memory(call, CPU) < 1.5 * size
    assert peak_memory(lambda: None, CPU) < size // 8


def test_floors():
    floors = Floors({"fp32": 100.0}, [(10, 50.0), (1000, 5.0)], 10.0)
    assert floors.seconds(Counts(flops=200.0, bytes=10.0, exps=10.0), "fp32") == (2.0, "matrix")
    assert floors.seconds(Counts(flops=1.0, bytes=10.0), "fp32") == (0.2, "memory")
    assert floors.seconds(Counts(flops=1.0, bytes=2000.0), "fp32") == (400.0, "memory")
    assert floors.read_rate(1) == 50.0
    assert floors.read_rate(100) == pytest.approx(250**0.5)
    assert floors.seconds(Counts(flops=1.0, bytes=1.0, exps=30.0), "fp32") == (3.0, "exponentials")


def test_the_better_of_two_measured_floors():
    disturbed = Floors({"fp32": 8.0, "bf16": 20.0}, [(10, 50.0), (1000, 7.0)], 9.0)
    undisturbed = Floors({"fp32": 10.0, "bf16": 19.0}, [(10, 40.0), (1000, 8.0)], 8.0)
    assert disturbed.better(undisturbed) == Floors(
        {"fp32": 10.0, "bf16": 20.0}, [(10, 50.0), (1000, 8.0)], 9.0
    )


def test_floors_are_measured():
    floors = measure_floors(1, CPU, ["fp32", "bf16"], seconds=0.01)
    assert floors.flops.keys() == {"fp32", "bf16"}
    assert all(
        rate > 1e8 for rate in (*floors.flops.values(), *(r for _, r in floors.bandwidth), floors.exps)
    )


# --- choosing and showing -----------------------------------------------------------------------------------


def test_every_case_is_in_a_suite():
    cases = registry.all_cases()
    standard, full = (registry.select(cases, suite=suite) for suite in ("standard", "full"))
    assert {case.key for case in standard} < {case.key for case in full}
    assert {case.op for case in standard} == set(registry.OPS)
    alone = [*registry.select(cases, suite="smoke"), *registry.select(cases, suite="growth")]
    assert sorted(case.key for case in [*full, *alone]) == sorted(case.key for case in cases)


def test_a_row_is_found_by_its_command():
    cases = registry.all_cases()
    for case in cases:
        assert case in registry.select(cases, ops=[case.op], names=[case.name])


@pytest.mark.parametrize(
    "options", [["--graphs"], ["--threads", "0"], ["--op", "nothing"], ["--json", "no/such/x.json"]]
)
def test_bad_options_end_the_run(options, capsys):
    with pytest.raises(SystemExit):
        main(["--suite", "smoke", *options])
    assert options[0] in capsys.readouterr().err


def test_a_forced_backend_serves_and_is_named(capsys):
    case = [
        "--case",
        "small/2,2,16,40,16/fp32",
        "--op",
        "target_attention",
        "--threads",
        "1",
        "--seconds",
        "0",
    ]
    try:
        assert main([*case, "--backend", "reference", "--json"]) == 0
    finally:
        attnrec.use_backend(None)
    captured = capsys.readouterr()
    (row,) = json.loads(captured.out)["rows"]
    assert row["backend"] == "reference"
    assert row["reproduce"].endswith("--backend reference")
    assert "attnrec (reference)" in captured.err


def test_list(capsys):
    assert main(["--list", "--op", "target_attention"]) == 0
    assert "table/8,4,256,200,32/fp32" in capsys.readouterr().out


def _results(commit, median, p10, p90):
    result = {"seconds": median, "p10": p10, "p90": p90, "memory": 2048}
    row = {"op": "x", "case": "y", "threads": 1, "results": {OURS: result}}
    return {"machine": describe(1, CPU) | {"commit": commit}, "rows": [row]}


def test_compare_tells_change_from_noise(capsys):
    old = _results("a", 2.0, 1.9, 2.1)
    assert compare.changes(old, _results("b", 1.0, 0.9, 1.1))[0][3:5] == ("2.00", "faster")
    assert compare.changes(old, _results("b", 3.0, 2.5, 3.5))[0][4] == "slower"
    assert compare.changes(old, _results("b", 1.9, 1.8, 2.0))[0][4] == ""
    new = _results("b", 1.0, 0.9, 1.1)
    new["machine"]["cpu"] = "another"
    compare.show(old, new)
    assert "not the same machine" in capsys.readouterr().out
    new["rows"][0]["threads"] = 2
    compare.show(old, new)
    assert "no case is in both" in capsys.readouterr().out


def test_units():
    assert tables.seconds(0.0123) == "12.3 ms"
    assert tables.seconds(4.5e-6) == "4.5 µs"
    assert tables.seconds(0.9996e-3) == "1000 µs"
    assert tables.bytes_(3 << 20) == "3 MiB"
    assert tables.bytes_(None) == "–"
