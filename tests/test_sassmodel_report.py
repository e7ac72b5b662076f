"""From the model's figures to costs of shapes, ratios to peers and the page."""

import pytest

pytest.importorskip("triton")

from benches import model, model_page


def modelled(kernel, table="target_attention", cost=1.0, head_dim=64, arch=90, stationary="rows", pack=1):
    """A block of 64 rows that takes 32 events an iteration: 100 cycles, 1,000 outside the loop."""
    m = model.Modelled(
        kernel=kernel,
        table=table,
        arch=arch,
        dtype="bfloat16",
        head_dim=head_dim,
        launch=(64, 32, 4, 2),
        registers=100,
        shared_bytes=20000,
        blocks=3,
        warps=3,
        pipe="issue",
        bound=40.0,
        loop=50.0 * cost,
        order=(48.0, 55.0),
        instructions=9.0,
        share_of_ceiling=0.5,
        ceiling="xu",
        notes=[],
        block=(stationary, 64, 32.0, pack, 1000.0 * cost, 100.0 * cost),
    )
    m.costs = {name: m.shape_cost(*shape) for name, shape in model.SHAPES.items()}
    return m


OURS, PEER = "target_attention._forward", "flash-linear-attention parallel_attn: parallel_attn_fwd_kernel"


def test_the_cost_of_a_shape():
    m = modelled(OURS)
    # 4 blocks of 64 rows; 10 tiles of 32 events, one of them masked and part of the fixed cost.
    assert m.shape_cost(256, 320) == pytest.approx(1000 * 4 * (1000 + 9 * 100) / (256 * 320))
    # 20 candidates cost a block as 64 do.
    assert m.shape_cost(20, 320) == pytest.approx(m.shape_cost(64, 320) * 64 / 20)
    # Four heads of a candidate in a tile: a quarter of the waste.
    packed = modelled(OURS, pack=4)
    assert packed.shape_cost(16, 320) == pytest.approx(1000 * (1000 + 9 * 100) / (64 * 320))
    # A long loop leaves the fixed cost behind: 100 cycles for 64 x 32 scores.
    assert m.costs["loop"] == pytest.approx(1000 * 100 / (64 * 32), rel=1e-3)
    # A block that holds events steps over rows.
    events = modelled(OURS, stationary="events")
    assert events.shape_cost(320, 256) == pytest.approx(m.shape_cost(256, 320))


def test_ratios_are_of_the_same_work_only():
    mine = [
        modelled(OURS),
        modelled(OURS, head_dim=32),
        modelled("target_attention_backward._rows", "target_attention_backward_rows"),
    ]
    found = model.ratios(mine, [modelled(PEER, cost=1.5)])
    assert [(m.kernel, m.head_dim) for m, _, _ in found] == [(OURS, 64)]
    assert all(x == pytest.approx(1.5) for x in found[0][2].values())


def test_floors_of_a_call():
    m = modelled(OURS)
    found = model.floors(m, 64, 256, 200)
    scores = 64 * 4 * 256 * 200
    assert found["compute"] == pytest.approx(scores * m.shape_cost(256, 200) / 1000 / 132 / 1830)
    assert found["memory"] == pytest.approx(1e6 * 64 * 4 * 64 * 2 * 2 * (256 + 200) / 3.35e12)


@pytest.mark.parametrize(("cost", "says"), [(2.0, "Nowhere slower"), (0.8, "Slower by the model in 6 of 6")])
def test_the_page_says_where_the_goals_are_missed(cost, says):
    mine, theirs = [modelled(OURS)], [modelled(PEER, cost=cost)]
    page = model_page.page(mine, theirs, model.ratios(mine, theirs), model.SHAPES, model.floors)
    assert says in page
    assert f"| {OURS} | `parallel_attn_fwd_kernel` | H100 D=64 | {cost:.2f} |" in page
    assert "Nothing here was measured on a GPU" in page
    assert "| target_attention | H100 | half | " in page
    assert f"1.25 at D <= 64 is reached in {6 if cost > 1.25 else 0} of 6" in page


def test_every_modelled_kernel_is_in_the_launch_tables():
    assert {work.table for work in model.WORK.values()} <= set(model.table(80))
