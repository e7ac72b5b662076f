"""How the CUDA C++ launchers divide their work: pure functions of shapes, asked without a GPU."""

import ctypes
import hashlib
import os
from collections import namedtuple
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ptxemu import project
from ptxemu.cuda_front import CUDA_HOME, _built, _cache_dir, _run

pytestmark = pytest.mark.skipif(project.why_not() is not None, reason=str(project.why_not()))
SOURCE = Path(__file__).with_name("standalone") / "cuda_plans.cpp"
FLOAT32, BFLOAT16, FLOAT16 = range(3)
CHUNK = 1024


@pytest.fixture(scope="module")
def plans():
    project.libraries()  # whose functions are called
    command = ["g++", "-std=c++17", "-fPIC", "-shared", f"-I{project.CSRC}", f"-I{CUDA_HOME}/include"]
    texts = [Path(x).read_bytes() for x in (SOURCE, *project.headers())]
    tag = hashlib.sha256(repr((command, texts)).encode()).hexdigest()[:16]
    path = os.path.join(_cache_dir(), f"cuda_plans_{tag}.so")
    return ctypes.CDLL(_built(path, lambda out: _run([*command, str(SOURCE), "-o", out])))


Plan = namedtuple("Plan", "chunks several aligned lanes parts logits partial")
AttentionPlan = namedtuple(
    "AttentionPlan",
    "warps row_blocks pack candidates tiles head_tiles chunks apart shared_bytes part_floats",
)
RowsPlan = namedtuple(
    "RowsPlan", "warps pack candidates tiles head_tiles chunks apart shared_bytes part_floats list_keys"
)
TopkPlan = namedtuple(
    "TopkPlan",
    "warps row_tiles k tile sample_blocks sampled part parts capacity room in_shared "
    "shared_bytes merge_bytes keys floats integers",
)
BackwardPlan = namedtuple(
    "BackwardPlan",
    "row_warps pack candidates row_tiles head_tiles row_bytes event_warps events event_tiles event_bytes",
)
ATTENTIONS = (
    st.sampled_from([FLOAT32, BFLOAT16, FLOAT16]),
    st.integers(1, 256),
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(0, 10**6),
    st.integers(0, 10**9),
    st.integers(0, 10**9),
    st.booleans(),
)


def attention_plan(function, plan, **more):
    """Asks for a plan of one of the target_attention ops; `more`: what it takes besides, by default."""

    def call(element, dim, heads, kv_heads, users, rows, events, bias=False, **given):
        out = (ctypes.c_int64 * len(plan._fields))()
        numbers = map(ctypes.c_int64, (dim, heads, kv_heads, users, rows, events))
        function(element, *numbers, ctypes.c_bool(bias), *map(ctypes.c_int64, (more | given).values()), out)
        return plan(*out)

    return call


def assert_heads_share_tiles(plan, heads, group, bias):
    assert plan.pack * plan.head_tiles == heads
    assert group % plan.pack == 0  # a tile's heads share a kv head
    assert plan.pack == 1 or not bias


@pytest.fixture
def softmax_score(plans):
    def plan(element, dim, users, items, stride=None, address=0, backward=False):
        out = (ctypes.c_int64 * len(Plan._fields))()
        numbers = map(ctypes.c_int64, (dim, users, items, stride or dim, address))
        plans.plan_softmax_score(element, *numbers, ctypes.c_bool(backward), out)
        return Plan(*out)

    return plan


class TestSoftmaxScore:
    @pytest.mark.parametrize(("users", "items"), [(1, 1), (3, 1024), (3, 1025), (1000, 5), (7, 1 << 33)])
    def test_there_is_a_block_for_every_chunk(self, softmax_score, users, items):
        """Of any batch of so many users and items: each user has at most one chunk that is not full."""
        plan = softmax_score(FLOAT32, 16, users, items)
        assert items // CHUNK + users <= plan.chunks <= -(-items // CHUNK) + users
        assert plan.several == (items > CHUNK)

    @pytest.mark.parametrize(
        ("element", "dim", "lanes"),
        [(FLOAT32, 1, 1), (FLOAT32, 64, 16), (FLOAT32, 1000, 32), (BFLOAT16, 64, 8), (FLOAT16, 65, 16)],
    )
    def test_lanes_of_an_item(self, softmax_score, element, dim, lanes):
        """A power of two, 16 bytes each."""
        assert softmax_score(element, dim, 1, 5).lanes == lanes

    def test_vectors_are_read_whole_where_they_lie_so(self, softmax_score):
        assert softmax_score(BFLOAT16, 64, 1, 5).aligned
        assert softmax_score(BFLOAT16, 64, 1, 5, stride=72).aligned
        assert not softmax_score(BFLOAT16, 60, 1, 5).aligned
        assert not softmax_score(BFLOAT16, 64, 1, 5, stride=68).aligned
        assert not softmax_score(BFLOAT16, 64, 1, 5, address=8).aligned
        assert softmax_score(FLOAT32, 60, 1, 5).aligned

    def test_scratch(self, softmax_score):
        """Logits leave a block only where a user may have several chunks and they are not given."""
        short = softmax_score(BFLOAT16, 64, 2, 1024, backward=True)
        assert (short.parts, short.logits, short.partial) == (3 * short.chunks, 0, 0)
        forward, backward = (softmax_score(BFLOAT16, 64, 2, 5000, backward=x) for x in (False, True))
        assert (forward.logits, forward.partial) == (5000, 0)
        assert (backward.logits, backward.partial) == (5000, backward.chunks * 64)
        assert softmax_score(FLOAT32, 64, 2, 5000, backward=True).logits == 0


class TestTargetAttention:
    @pytest.fixture
    def plan(self, plans):
        return attention_plan(plans.plan_target_attention, AttentionPlan)

    @given(*ATTENTIONS)
    def test_fits_the_chip_and_covers_the_batch(
        self, plan, element, dim, group, kv_heads, users, rows, events, bias
    ):
        heads = group * kv_heads
        p = plan(element, dim, heads, kv_heads, users, rows, events, bias)
        assert p.warps in (1, 2, 4)
        assert p.shared_bytes <= 163 * 1024  # an A100's block
        assert_heads_share_tiles(p, heads, group, bias)
        assert p.candidates * p.pack <= 16 * p.row_blocks * p.warps
        assert p.tiles >= -(-rows // p.candidates) + users
        assert p.chunks * CHUNK >= events
        assert bool(p.part_floats) == bool(p.apart and rows)

    def test_few_candidates_leave_no_warp_idle(self, plan):
        assert plan(BFLOAT16, 64, 4, 4, users=100, rows=100, events=1000).warps == 1
        assert plan(BFLOAT16, 64, 4, 4, users=100, rows=100 * 100, events=1000).warps == 4
        assert plan(BFLOAT16, 64, 8, 2, users=100, rows=100, events=1000).pack == 4

    def test_a_long_history_is_cut_where_rows_do_not_fill_a_chip(self, plan):
        one = plan(BFLOAT16, 64, 2, 2, users=1, rows=20, events=10_000)
        assert one.apart
        assert one.chunks == 10
        many = plan(BFLOAT16, 64, 2, 2, users=1000, rows=200_000, events=10_000_000)
        assert not many.apart
        assert many.part_floats == 0


class TestTargetAttentionWeights:
    @pytest.fixture
    def plan(self, plans):
        return attention_plan(plans.plan_target_attention_weights, RowsPlan, top=-1)

    @given(*ATTENTIONS, st.integers(-1, 10**4))
    def test_fits_the_chip_and_covers_the_batch(
        self, plan, element, dim, group, kv_heads, users, rows, events, bias, top
    ):
        heads = group * kv_heads
        p = plan(element, dim, heads, kv_heads, users, rows, events, bias, top=top)
        assert p.warps in (1, 2, 4)
        assert p.shared_bytes <= 99 * 1024  # the smallest of sm_80 and later
        assert_heads_share_tiles(p, heads, group, bias)
        assert p.candidates * p.pack <= 16 * p.warps
        assert p.tiles >= -(-rows // p.candidates) + users
        assert p.chunks * CHUNK >= events
        assert p.part_floats == (2 * p.chunks * rows * heads if p.apart else 0)
        assert p.list_keys == (p.chunks * rows * heads * max(top, 0) if p.apart else 0)
        assert p.list_keys <= 1 << 23

    def test_a_long_history_is_cut_where_rows_do_not_fill_a_chip(self, plan):
        sizes = {"heads": 2, "kv_heads": 2, "users": 1, "rows": 20, "events": 10_000}
        assert plan(BFLOAT16, 64, **sizes).apart
        assert plan(BFLOAT16, 64, **sizes, top=10).apart
        assert not plan(BFLOAT16, 64, **sizes | {"users": 1000, "rows": 200_000, "events": 10**7}).apart

    def test_nor_where_its_lists_would_fill_the_memory(self, plan):
        sizes = {"heads": 4, "kv_heads": 4, "users": 1, "rows": 200, "events": 100_000}
        assert plan(BFLOAT16, 64, **sizes, top=100).apart
        assert not plan(BFLOAT16, 64, **sizes, top=1000).apart


class TestTargetAttentionBackward:
    @pytest.fixture
    def plan(self, plans):
        return attention_plan(plans.plan_target_attention_backward, BackwardPlan)

    @given(*ATTENTIONS)
    def test_fits_the_chip_and_covers_the_batch(
        self, plan, element, dim, group, kv_heads, users, rows, events, bias
    ):
        heads = group * kv_heads
        p = plan(element, dim, heads, kv_heads, users, rows, events, bias)
        assert 1 <= p.row_warps <= 4
        assert 1 <= p.event_warps <= 4
        assert max(p.row_bytes, p.event_bytes) <= 99 * 1024  # a block of the smallest chip from sm_80 on
        assert_heads_share_tiles(p, heads, group, bias)
        assert 1 <= p.candidates * p.pack <= 16 * p.row_warps
        assert p.events <= 16 * p.event_warps
        assert p.row_tiles >= -(-rows // p.candidates) + users
        assert p.event_tiles >= -(-events // p.events) + users

    def test_small_users_leave_no_warp_idle(self, plan):
        small = plan(BFLOAT16, 64, 4, 4, users=100, rows=100, events=1000)
        large = plan(BFLOAT16, 64, 4, 4, users=100, rows=100 * 100, events=100 * 1000)
        assert (small.row_warps, small.event_warps) == (1, 1)
        assert (large.row_warps, large.event_warps) == (4, 4)

    def test_wide_heads_are_shared_by_warps(self, plan):
        wide = plan(BFLOAT16, 200, 1, 1, users=1, rows=8, events=8)
        assert (wide.row_warps, wide.event_warps) == (2, 2)
        assert plan(FLOAT32, 200, 1, 1, users=1, rows=8, events=8).event_warps == 4


CrossEntropyPlan = namedtuple("CrossEntropyPlan", "warps row_tiles splits split shared_bytes scratch_bytes")
GradientPass = namedtuple("GradientPass", "warps tile pieces piece part_floats shared_bytes")
elements = st.sampled_from([FLOAT32, BFLOAT16, FLOAT16])
SMALLEST_BLOCK = 99 * 1024  # shared memory of a block on sm_86, sm_89 and sm_120


class TestCatalogCrossEntropy:
    @pytest.fixture
    def plan(self, plans):
        def call(element, dim, rows, items, negatives=-1):
            out = (ctypes.c_int64 * 6)()
            plans.plan_catalog_cross_entropy(
                element, *map(ctypes.c_int64, (dim, rows, items, negatives)), out
            )
            return CrossEntropyPlan(*out)

        return call

    @given(elements, st.integers(1, 256), st.integers(0, 10**7), st.integers(0, 10**8))
    def test_covers_rows_and_items(self, plan, element, dim, rows, items):
        p = plan(element, dim, rows, items)
        assert p.warps in (1, 2, 4)
        assert p.shared_bytes <= SMALLEST_BLOCK
        assert p.row_tiles * p.warps * 32 >= rows  # at most 32 rows a warp
        assert p.splits * p.split >= items
        assert (p.splits - 1) * p.split < max(items, 1)
        assert p.split % 16 == 0
        assert p.splits == plan(element, dim, 1, items).splits  # whatever the batch
        assert p.scratch_bytes >= 8 * rows * p.splits

    def test_few_rows_leave_no_warp_idle(self, plan):
        assert plan(FLOAT32, 64, 16, 10**5).warps == 1
        assert plan(BFLOAT16, 64, 33, 10**5).warps == 2
        assert plan(BFLOAT16, 64, 4096, 10**5).warps == 4

    def test_negatives_are_the_items(self, plan):
        assert plan(BFLOAT16, 64, 100, 10**6, negatives=0).splits == 0
        assert plan(BFLOAT16, 64, 100, 10**6, negatives=3000).splits == 2


class TestCatalogCrossEntropyBackward:
    @pytest.fixture
    def plan(self, plans):
        def call(element, dim, rows, items, negatives=-1):
            out = (ctypes.c_int64 * 15)()
            numbers = map(ctypes.c_int64, (dim, rows, items, negatives))
            plans.plan_catalog_cross_entropy_backward(element, *numbers, out)
            group, direct, scratch = out[12:]
            return GradientPass(*out[:6]), GradientPass(*out[6:12]), group, bool(direct), scratch

        return call

    @given(elements, st.integers(1, 256), st.integers(0, 10**7), st.integers(0, 10**8))
    def test_covers_rows_and_items(self, plan, element, dim, rows, items):
        users, of_items, group, direct, scratch = plan(element, dim, rows, items)
        for p, stream in ((users, items), (of_items, rows)):
            assert p.warps in (1, 2, 4)
            assert p.shared_bytes <= SMALLEST_BLOCK
            assert p.tile in (16 * p.warps, 32 * p.warps)
            assert p.pieces * p.piece >= stream
            assert p.pieces * p.piece - stream < max(p.piece, 1)
        assert users.pieces == plan(element, dim, 1, items)[0].pieces  # whatever the batch
        assert group == rows or group % users.tile == 0
        assert scratch >= 4 * (users.part_floats + (0 if direct else of_items.part_floats))

    def test_sums_of_many_users_do_not_wait_side_by_side(self, plan):
        users, _, group, *_ = plan(BFLOAT16, 64, 10**6, 10**6)
        assert users.part_floats == users.pieces * group * 64 <= 1 << 24
        assert plan(BFLOAT16, 64, 1000, 10**6)[2] == 1000

    def test_a_large_table_gets_its_gradient_directly(self, plan):
        assert plan(BFLOAT16, 64, 10**4, 10**6)[3]
        _, of_items, _, direct, _ = plan(BFLOAT16, 64, 10**4, 1000)
        assert not direct
        assert of_items.pieces > 1
        assert not plan(BFLOAT16, 64, 100, 10**6, negatives=10**5)[3]


class TestCatalogTopk:
    @pytest.fixture
    def plan(self, plans):
        def call(element, dim, users, items, k, exclusions=0):
            out = (ctypes.c_int64 * len(TopkPlan._fields))()
            plans.plan_catalog_topk(element, *map(ctypes.c_int64, (dim, users, items, k, exclusions)), out)
            return TopkPlan(*out)

        return call

    @given(
        st.sampled_from([FLOAT32, BFLOAT16, FLOAT16]),
        st.integers(1, 256),
        st.integers(0, 10**6),
        st.one_of(st.integers(0, 20_000), st.integers(0, 2**30 - 1)),
        st.one_of(st.integers(0, 4096), st.integers(0, 2**30)),
    )
    def test_fits_the_chip_and_covers_the_catalogue(self, plan, element, dim, users, items, k):
        k = min(k, items)
        p = plan(element, dim, users, items, k)
        assert p.warps in (1, 2, 4)
        assert p.shared_bytes <= 163 * 1024  # an A100's block
        assert p.merge_bytes <= 99 * 1024
        assert 16 * p.warps * p.row_tiles >= users
        assert p.parts * p.part >= items > (p.parts - 1) * p.part - (items == 0)
        assert p.parts <= 2048
        assert p.part % p.tile == 0
        # A list has room for the k best and a tile, or for all of its part.
        assert p.capacity == p.part or p.capacity >= p.k + p.tile
        assert p.room >= p.k + 256  # what a round of the merge adds
        lists = 8 * users * p.parts * p.capacity
        assert lists <= max(128 << 20, 8 * users * p.capacity)
        if p.sample_blocks:
            assert p.sample_blocks * p.tile >= 4 * p.k
            assert p.sampled >= p.tile  # no group is empty
            assert 7 * p.sample_blocks * p.sampled <= items
            # The id of the last row of the last tile that is read ahead fits in an int.
            assert 7 * p.sample_blocks * (p.sampled + p.tile) < 2**31

    def test_scratch(self, plan):
        p = plan(BFLOAT16, 64, 10, 1_000_000, 100, exclusions=70)
        assert p.sample_blocks
        assert p.in_shared
        assert p.keys == 10 * (p.parts * p.capacity + 1)
        assert p.floats == 10 * (2 * p.parts + p.sample_blocks * p.tile + 1)
        assert p.integers == 10 * p.parts + 70
        p = plan(BFLOAT16, 64, 10, 20_000, 10_000)
        assert not p.sample_blocks
        assert not p.in_shared
        assert p.keys == 10 * (p.parts * p.capacity + p.room)

    def test_few_users_share_the_chip_among_parts(self, plan):
        alone, many = (plan(FLOAT32, 64, users, 1_000_000, 100) for users in (1, 4096))
        assert (alone.warps, many.warps) == (1, 4)
        assert alone.parts > 1000 > many.parts

    def test_a_small_catalogue_has_no_sample(self, plan):
        assert not plan(FLOAT32, 64, 100, 500, 10).sample_blocks
        assert not plan(FLOAT32, 64, 100, 50_000, 5000).sample_blocks
        assert plan(FLOAT32, 64, 100, 50_000, 100).sample_blocks
