"""The figures of docs/catalog.md: every row is printed. Never a time."""

import pytest

from benches import catalog_update


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_every_cost_is_printed(dtype, capsys):
    options = ["--items", "300", "--dim", "8", "--dtype", dtype, "--seconds", "0.2", "--updates", "50"]
    assert catalog_update.main(options) == 0
    printed = capsys.readouterr().out
    for row in (
        "pack",
        "first update, of 1 item",
        "update of 100",
        "append of 3, with the move",
        "save",
        "load, mapped",
        "search, nobody updates",
        "search, 50 updates a second",
        "update of 100 beside the searches",
    ):
        assert row in printed, row
