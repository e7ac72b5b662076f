"""The report, the page in docs/, growth's slope, and another revision beside this tree."""

import json
import math
import re

import pytest
import torch

from benches import base, machine, performance, report, tables
from benches.run import OURS, failed

CPU = torch.device("cpu")


def _row(case, ratio=None, *, varied=None, seconds=1e-3, more=None, wrong=None):
    def result(time, of_ratio):
        return {
            "seconds": time,
            "p10": time,
            "p90": time,
            "ratio": of_ratio,
            "gflops": 10.0,
            "gbytes_per_second": 1.0,
            "share": 0.5,
            "memory": 1 << 20,
            "note": "",
        }

    results = {} if wrong else {OURS: result(seconds, 1.0)}
    if ratio is not None:
        results["peer"] = result(seconds * ratio, ratio)
    return {
        "op": "op",
        "case": case,
        "dtype": "fp32",
        "varied": varied,
        "reproduce": f"python -m benches --op op --case {case}",
        "backend": "cpu",
        "bound": "matrix",
        "results": results,
        "refused": {"absent": "not installed"},
        "wrong": {OURS: wrong} if wrong else {},
        "more": more,
    }


@pytest.fixture
def results():
    services = {OURS: {"p50": 0.001, "p95": 0.002, "p99": 0.003, "requests_per_second": 100.0}}
    more = {"requests": 10, "arrivals_per_second": 50.0, "services": services}
    rows = [
        _row("one", 2.0),
        _row("two", 0.5, more=more),
        _row("bad", wrong="out: error 1"),
        *(_row(f"g{n}", 3.0, varied=["events", n], seconds=1e-6 * n * n) for n in (64, 128, 256, 512)),
    ]
    return {
        "command": "python -m benches",
        "suite": "standard",
        "machine": machine.describe(1, CPU),
        "floors": {"flops": {"fp32": 1e11}, "bandwidth": [[1 << 20, 1e10]], "exps": 1e9},
        "memory": "measured so",
        "started": "2026-01-02T03:04:05Z",
        "seconds": 12.0,
        "rows": rows,
    }


def test_report(results, tmp_path):
    page = report.write(results, tmp_path / "out").read_text()
    pictures = re.findall(r"<img src='([^']+)'", page)
    assert pictures == ["op.png", "latency.png", "growth.png"]
    for name in pictures:
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert "WRONG: out: error 1" in page
    assert "python -m benches --op op --case two" in page
    assert "not installed" in page
    assert results["machine"]["cpu"] in page
    assert page.count("<table>") == page.count("</table>") == 5


def _several(case, ratios):
    row = _row(case)
    for name, of in ratios.items():
        row["results"][name] = row["results"][OURS] | {"ratio": of}
    return row


def test_families_take_the_better_of_two_layouts():
    rows = [
        _several("table/1,2/fp32", {"sdpa": 4.0, "sdpa-strided": 2.0, "openvino": 3.0}),
        _several("table/3,4/fp32", {"sdpa": 8.0, "sdpa-strided": 9.0, "openvino": 12.0, "+visible": 0.1}),
        _several("alone/5/fp32", {"sdpa": 1.0}),
    ]
    lines = {line[2]: line for line in tables.family_lines(rows)}
    assert lines["sdpa, better layout"] == (
        "op/table",
        "fp32",
        "sdpa, better layout",
        "2",
        "4.00",
        "2.00",
        "1,2",
    )
    assert lines["openvino"][4:] == ("6.00", "3.00", "1,2")
    assert lines.keys() == {"sdpa", "sdpa-strided", "openvino", "sdpa, better layout"}


def test_ours_with_something_added_is_no_peer():
    row = _several("options/1/fp32", {"+visible": 1.25, "peer": 2.0})
    ((header, lines),) = tables.variants([row, _row("other", 2.0)])
    assert header == ("case", OURS, "+visible")
    assert lines == [("op/options/1/fp32", "1 ms", "×1.25")]
    assert [line[4] for line in tables.lines(row)] == ["1", "×1.25", "2.00"]
    assert tables.against_the_fastest([row])[0][3] == 2.0
    row["wrong"]["+self"] = "out: error 1"
    assert tables.variants([row])[0][1] == [("op/options/1/fp32", "1 ms", "×1.25", "wrong")]
    assert failed(row)


def test_notes_and_backends_are_shown():
    row = _row("one", 2.0)
    row["results"]["peer"]["note"] = "padding not timed"
    row["backend"] = "triton"
    assert [line[1] for line in tables.lines(row)] == ["attnrec (triton)", "peer *"]
    assert tables.notes([row]) == "* peer: padding not timed"


def test_slope_is_the_exponent():
    assert tables.slope([(n, 3.0 * n**2) for n in (1, 2, 4, 8, 16)]) == pytest.approx(2.0)
    # Small sizes that cost the price of a call do not count.
    assert tables.slope([(n, max(1.0, n / 8)) for n in (1, 2, 8, 16, 32, 64)]) == pytest.approx(1.0)
    assert math.isnan(tables.slope([(1, 1.0)]))


def test_page_of_the_documentation(results):
    text = performance.section(results, "x.json")
    assert "| `one` | 1 ms | 10 | 50% | 1 MiB | **2.00** |" in text
    assert "wrong: out: error 1" in text
    assert "| `op` | fp32 | 2 | 1.00 | 0.50 | 2.00 |" in text
    assert "`g64`" not in text


def test_documentation_is_what_the_committed_results_give():
    files = sorted(performance.RESULTS.glob("*.json"))
    assert files
    assert performance.PAGE.read_text() == performance.page(files), "run python -m benches.performance"


def test_committed_results_name_machine_and_commit():
    for file in performance.RESULTS.glob("*.json"):
        found = json.loads(file.read_text())
        assert found["machine"]["commit"][:7] in file.name
        assert file.stat().st_size < 1 << 20


def test_another_revision_runs_beside_this_tree(tmp_path):
    """The protocol, with this tree in both places: building another is what `--base` adds."""
    workers = [base.Worker(base.ROOT, "cpu", 1, tmp_path / name) for name in ("a", "b")]
    try:
        times = base.measure(workers, "target_attention/small/2,2,16,40,16/fp32", 0.0)
        assert times[0].rounds == times[1].rounds >= 3
        assert times[1].ratio == 1
        with pytest.raises(SystemExit):
            base.measure(workers, "no/such/case", 0.0)
    finally:
        for worker in workers:
            worker.close()


def test_an_unknown_revision():
    with pytest.raises(SystemExit, match="no such revision"), base.worktree("no-such-revision"):
        pass
