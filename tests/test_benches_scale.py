"""`python -m benches.scale`: the bytes that its model counts do travel, and it writes the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_sharded_catalog import TESTS, torchrun

from benches import scale, scale_page

pytestmark = pytest.mark.cpu_only("processes over gloo")


def test_bytes_are_those_of_the_model():
    cases = [scale._topk(300, 5), scale._topk(300, 3, "int8"), scale._loss(200, 7)]
    found = scale.measure([{**case, "k": 20} if "k" in case else case for case in cases], ranks=(2,))
    assert [row["ranks"] for row in found] == [2, 2, 2]
    for row in found:
        assert row["received"] == scale_page.modelled_received(row), row
        assert row["processor"] > 0
        assert row["clock"] > 0


def test_bytes_of_own_users(tmp_path):
    """The formulas of the paper model, which the measurements do not use."""
    ended = torchrun(2, TESTS / "sharded_bytes_worker.py", tmp_path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads((tmp_path / "bytes.json").read_text())
    assert found["topk"] == scale.own_topk_received(2, users=5, dim=8, k=6)
    assert found["loss"] == scale.own_loss_received(2, positions=5, dim=8, events=9)


def test_committed_measurements_agree_with_the_model():
    rows = json.loads(scale.RESULTS.read_text())["rows"]
    assert {row["ranks"] for row in rows} == set(scale.RANKS)
    assert all(row["received"] == scale_page.modelled_received(row) for row in rows)


def test_the_page_is_what_the_command_writes(tmp_path):
    scale.main(["--docs", str(tmp_path / "scale.md")])
    page = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
    assert (tmp_path / "scale.md").read_text() == page.read_text()


def test_the_model_grows_as_it_should():
    host, a = scale.HOSTS[0], scale.Assumptions()
    few = scale.figures(host, a)
    more_hosts = scale.figures(host, scale.Assumptions(hosts=128))
    more_items = scale.figures(host, scale.Assumptions(items=2e9))
    assert more_hosts.serving == few.serving / 2
    assert more_items.read == 2 * few.read
    assert more_items.topk_network == few.topk_network
    assert more_items.loss_products == 2 * few.loss_products


def test_other_assumptions(capsys):
    scale.main(["--items", "1e6", "--hosts", "2", "--host", "mine,10,0.1,8,1,0.5"])
    said = capsys.readouterr().out
    assert "mine" in said
    assert "GPU" not in said
