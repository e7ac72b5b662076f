"""The part of the suite that slow runners keep."""

from itertools import product

import pytest
from runners import RUNNERS, chosen, covering


def test_every_value_of_every_parameter_is_kept():
    cases = [{"a": a, "b": b, "c": c} for a, b, c in product(range(5), "xyz", (None, 1))]
    kept = covering(cases)
    for name in "abc":
        assert {cases[index][name] for index in kept} == {case[name] for case in cases}
    assert 5 <= len(kept) <= 7
    assert kept == covering(cases) == sorted(kept)


def test_values_meet_in_more_than_one_combination():
    """Always beside the same value of another parameter, one would be tested in that light alone."""
    cases = [{"a": a, "b": b} for a, b in product(range(16), range(4))]
    beside = {cases[index]["b"] for index in covering(cases)}
    counts = [sum(cases[index]["b"] == b for index in covering(cases)) for b in beside]
    assert min(counts) >= 3


def test_a_test_without_a_choice_is_kept():
    assert covering([{"a": 1}]) == [0]


def test_the_environment_chooses(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("ATTNREC_TEST_EXAMPLES", raising=False)
    monkeypatch.delenv("ATTNREC_TEST_FULL", raising=False)
    monkeypatch.setenv("ATTNREC_TEST_RUNNER", "emulator")
    assert chosen() == RUNNERS["emulator"]
    assert chosen().smaller(8000) == 1000
    monkeypatch.setenv("ATTNREC_TEST_FULL", "1")
    assert (chosen().thin, chosen().smaller(8000), chosen().backend) == (False, 8000, "triton")
    monkeypatch.setenv("ATTNREC_TEST_RUNNER", "device")
    monkeypatch.setenv("ATTNREC_TEST_FULL", "0")
    assert (chosen().thin, chosen().examples) == (True, 5)
    monkeypatch.setenv("ATTNREC_TEST_EXAMPLES", "2")
    assert chosen().examples == 2
    monkeypatch.setenv("ATTNREC_TEST_RUNNER", "gpu")
    with pytest.raises(
        ValueError, match="must be one of native, interpreter, emulator, cuda-emulator, device, got 'gpu'"
    ):
        chosen()


def test_only_the_native_runner_has_the_usual_choice():
    assert [runner.name for runner in RUNNERS.values() if runner.backend is None] == ["native"]
