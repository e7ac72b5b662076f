"""Instructions in which lanes, warps or threads work together."""

# ruff: noqa: E501 (PTX stands on long lines)

import numpy as np
import pytest
from emu_util import bf16, bf16_value, run_body
from ptxemu import PtxError, launch_ptx

rng = np.random.default_rng(3)
HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n"
T = np.arange(64)


def u32(n=64):
    return rng.integers(0, 2**32, n, dtype=np.uint32)


# ---------------------------------------------------------------- shuffle, vote, match, redux


def shuffle(mode, x, b, c):
    """The definition, lane by lane."""
    out, ok = np.empty_like(x), np.empty(len(x), bool)
    for i in range(len(x)):
        lane, base = i % 32, i // 32 * 32
        bb, cc = int(b[i]) & 31, int(c[i])
        seg, clamp = cc >> 8 & 31, cc & 31
        top, bottom = (lane & seg) | (clamp & ~seg & 31), lane & seg
        j, p = {
            "up": (lane - bb, lane - bb >= top),
            "down": (lane + bb, lane + bb <= top),
            "bfly": (lane ^ bb, (lane ^ bb) <= top),
            "idx": (bottom | (bb & ~seg & 31), (bottom | (bb & ~seg & 31)) <= top),
        }[mode]
        ok[i] = p
        out[i] = x[base + (j if p else lane)]
    return out, ok


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl(mode):
    x, b = u32(), rng.integers(0, 40, 64, dtype=np.uint32)
    for c in (
        0x1F if mode != "up" else 0,
        (16 << 8) | (31 if mode != "up" else 0),
        (28 << 8) | (3 if mode != "up" else 0),
        (24 << 8) | 5,
    ):
        got = run_body(
            f"shfl.sync.{mode}.b32 o0|p, i0, i1, {c}, -1; selp.b32 o1, 1, 0, p;",
            [("u32", x), ("u32", b)],
            [("u32", np.uint32)] * 2,
        )
        want, ok = shuffle(mode, x, b, np.full(64, c))
        assert (got[0] == want).all()
        assert (got[1] == ok).all()
        k = 5  # the same with immediates
        got = run_body(
            f"shfl.sync.{mode}.b32 o0, i0, {k}, {c}, 0xffffffff;", [("u32", x)], [("u32", np.uint32)]
        )
        assert (got == shuffle(mode, x, np.full(64, k), np.full(64, c))[0]).all()


def test_shfl_of_a_non_member_is_undefined_not_plausible():
    x = np.arange(64, dtype=np.uint32)
    got = run_body(
        "mov.u32 t0, %laneid; setp.lt.u32 p, t0, 16; mov.u32 o0, 0; @!p bra L; shfl.sync.down.b32 o0, i0, 8, 31, 0xffff; L:",
        [("u32", x)],
        [("u32", np.uint32)],
    ).reshape(2, 32)
    assert (got[:, :8] == x.reshape(2, 32)[:, 8:16]).all()
    assert (got[:, 8:16] == 0x7FFFDEAD).all()
    assert (got[:, 16:] == 0).all()


def test_lanes_that_part_meet_again_at_a_shuffle():
    """The two halves of a warp come to one shfl by different ways; it must wait for both."""
    got = run_body(
        """
        mov.u32 t0, %laneid; setp.lt.u32 p, t0, 16; mov.u32 t1, 0;
        @p bra A;
        mov.u32 t2, 0;
     B: add.u32 t2, t2, 1; setp.lt.u32 q, t2, t0; @q bra B;
        mov.u32 t1, 1000;
     A: add.u32 t1, t1, t0;
        shfl.sync.bfly.b32 o0, t1, 16, 31, -1;""",
        [("u32", np.zeros(64, np.uint32))],
        [("u32", np.uint32)],
    ).reshape(2, 32)
    lane = np.arange(32)
    mine = lane + np.where(lane < 16, 0, 1000)
    assert (got == mine[lane ^ 16]).all()


def test_one_warp_whole_and_one_parted_at_the_same_shuffle():
    """Warp 0 comes to the shuffles in two parts, one by code that lies behind them; warp 1 goes ahead."""
    got = run_body(
        """
        mov.u32 t0, %tid.x; mov.u32 t1, 0; setp.lt.u32 p, t0, 7; @p bra FAR;
     A: add.u32 t1, t1, t0; shfl.sync.bfly.b32 o0, t1, 1, 31, -1; vote.sync.ballot.b32 o1, p, -1; mov.u32 o2, %clock; bra X;
     FAR: mov.u32 t2, 0;
     B: add.u32 t2, t2, 1; setp.le.u32 q, t2, t0; @q bra B;
        mov.u32 t1, 500; bra A;
     X:""",
        [("u32", np.zeros(64, np.uint32))],
        [("u32", np.uint32)] * 3,
    )
    mine = T + np.where(T < 7, 500, 0)
    assert (got[0] == mine[T ^ 1]).all()
    assert (got[1] == np.where(T < 32, 127, 0)).all()
    assert (got[2][32:] < got[2][:32].min()).all()  # warp 1 did not wait


def test_ldmatrix_and_mma_while_another_warp_is_away():
    """The same for matrix instructions: the result is that of warps that come together."""

    def run(parted):
        body = f"""
            .shared .align 16 .b8 m[2048]; .reg .b32 x<4>, d<4>; .reg .pred first;
            mov.u32 t0, m; mad.lo.u32 t0, tid, 16, t0; st.shared.v4.b32 [t0], {{i0, i0, i1, i1}}; bar.sync 0;
            setp.lt.u32 first, tid, {parted}; mov.u32 t1, 0; @first bra FAR;
         A: ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{x0, x1, x2, x3}}, [t0];
            mov.b32 d0, i1; mov.b32 d1, i1; mov.b32 d2, i1; mov.b32 d3, i1;
            mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{d0, d1, d2, d3}}, {{x0, x1, x2, x3}}, {{i0, i1}}, {{d0, d1, d2, d3}};
            mov.b32 o0, x3; mov.b32 o1, d0; mov.b32 o2, d3; bra X;
         FAR: add.u32 t1, t1, 1; setp.lt.u32 q, t1, tid; @q bra FAR; bra A;
         X:"""
        r = np.random.default_rng(0)
        h = [r.standard_normal(256).astype(np.float16).view(np.uint32) for _ in range(2)]
        return run_body(body, [("b32", h[0]), ("b32", h[1])], [("b32", np.uint32)] * 3)

    together = run(0)
    for parted in (1, 20, 32, 40, 128):
        assert all((x == y).all() for x, y in zip(run(parted), together, strict=True))


def test_a_warp_goes_on_when_the_missing_lanes_have_exited():
    for schedule in ("lockstep", "random"):
        got = run_body(
            """
            mov.u32 t0, %laneid; mov.u32 o0, 1; setp.ge.u32 p, t0, 24; mov.u32 t1, 0; @p bra L;
            redux.sync.add.u32 o0, t0, -1; bra X;
         L: add.u32 t1, t1, 1; setp.lt.u32 q, t1, 9; @q bra L;
            st.global.u32 [a1], t1; exit;
         X:""",
            [("u32", np.zeros(64, np.uint32))],
            [("u32", np.uint32)],
            schedule=schedule,
        ).reshape(2, 32)
        assert (got[:, :24] == 24 * 23 // 2).all()
        assert (got[:, 24:] == 9).all()


def test_vote_and_match_and_redux():
    x = rng.integers(0, 4, 64, dtype=np.uint32)
    x[32:] = 2
    got = run_body(
        "setp.eq.u32 p, i0, 2; vote.sync.ballot.b32 o0, p, -1; vote.sync.any.pred q, p, -1; selp.b32 o1,1,0,q; vote.sync.all.pred q, p, -1; selp.b32 o2,1,0,q;"
        "vote.sync.uni.pred q, p, -1; selp.b32 o3,1,0,q; match.any.sync.b32 o4, i0, -1; match.all.sync.b32 o5|q, i0, -1; selp.b32 o6,1,0,q; activemask.b32 o7;"
        "redux.sync.add.u32 o8, i0, -1; redux.sync.max.u32 o9, i0, -1; redux.sync.min.s32 o10, i0, -1; redux.sync.xor.b32 o11, i0, -1; redux.sync.and.b32 o12, i0, -1;",
        [("u32", x)],
        [("u32", np.uint32)] * 13,
    )
    for w in range(2):
        v = x[32 * w : 32 * w + 32]
        s = slice(32 * w, 32 * w + 32)

        def bits(b):
            return sum(int(y) << i for i, y in enumerate(b))

        want = [bits(v == 2), (v == 2).any(), (v == 2).all(), (v == 2).all() or not (v == 2).any()]
        for g, y in zip(got[:4], want, strict=True):
            assert (g[s] == y).all()
        assert (got[4][s] == [bits(v == y) for y in v]).all()
        all_same = (v == v[0]).all()
        assert (got[5][s] == (0xFFFFFFFF if all_same else 0)).all()
        assert (got[6][s] == all_same).all()
        assert (got[7][s] == 0xFFFFFFFF).all()
        for k, f in (
            (8, np.add),
            (9, np.maximum),
            (10, np.minimum),
            (11, np.bitwise_xor),
            (12, np.bitwise_and),
        ):
            assert (got[k][s] == f.reduce(v)).all()


def test_partial_member_mask():
    x = rng.integers(0, 1000, 64, dtype=np.uint32)
    got = run_body(
        "mov.u32 t0, %laneid; and.b32 t1, t0, 1; setp.eq.u32 p, t1, 0; mov.u32 o0, 0; mov.u32 o1, 0;"
        "@p bra E; redux.sync.add.u32 o0, i0, 0xAAAAAAAA; setp.gt.u32 q, i0, 500; vote.sync.ballot.b32 o1, q, 0xAAAAAAAA; bra X;"
        "E: redux.sync.add.u32 o0, i0, 0x55555555; activemask.b32 o1; X:",
        [("u32", x)],
        [("u32", np.uint32)] * 2,
    )
    for w in range(2):
        v = x[32 * w : 32 * w + 32]
        assert (got[0][32 * w : 32 * w + 32 : 2] == v[::2].sum()).all()
        assert (got[0][32 * w + 1 : 32 * w + 32 : 2] == v[1::2].sum()).all()
        assert (got[1][32 * w : 32 * w + 32 : 2] == 0x55555555).all()
        assert (
            got[1][32 * w + 1 : 32 * w + 32 : 2] == sum(1 << i for i in range(1, 32, 2) if v[i] > 500)
        ).all()


# ---------------------------------------------------------------- barriers


def test_bar_red():
    x = (rng.random(128) < 0.3).astype(np.uint32)
    for schedule in ("lockstep", "random"):
        got = run_body(
            "setp.ne.u32 p, i0, 0; barrier.cta.red.aligned.popc.u32 o0, 0, p; bar.red.or.pred q, 0, p; selp.b32 o1,1,0,q; bar.red.and.pred q, 0, !p; selp.b32 o2,1,0,q;"
            "mov.pred p, 0; bar.red.and.pred q, 0, !p; selp.b32 o3,1,0,q;",
            [("u32", x)],
            [("u32", np.uint32)] * 4,
            schedule=schedule,
        )
        assert (got[0] == x.sum()).all()
        assert (got[1] == 1).all()
        assert (got[2] == 0).all()
        assert (got[3] == 1).all()


@pytest.mark.parametrize("schedule", ["lockstep", "random"])
def test_named_barriers_between_producer_and_consumer_warps(schedule):
    ptx = (
        HEAD
        + """
    .visible .entry k(.param .u64 P0, .param .u64 P1) {
      .reg .pred p; .reg .b32 t, w, s, v; .reg .b64 a, b;
      .shared .align 4 .b8 buf[128];
      mov.u32 t, %tid.x; shr.u32 w, t, 5; and.b32 s, t, 31;
      ld.param.u64 a, [P0]; ld.param.u64 b, [P1];
      setp.eq.u32 p, w, 0; @p bra PRODUCER;
      bar.sync 1, 64;
      xor.b32 s, s, 31; shl.b32 s, s, 2; mov.u32 v, buf; add.u32 s, s, v; ld.shared.u32 v, [s];
      mad.wide.u32 b, t, 4, b; st.global.u32 [b+-128], v; ret;
    PRODUCER:
      mad.wide.u32 a, t, 4, a; ld.global.u32 v, [a];
      shl.b32 s, s, 2; mov.u32 w, buf; add.u32 s, s, w; st.shared.u32 [s], v;
      bar.arrive 1, 64; ret;
    }"""
    )
    for seed in range(4):
        x, o = u32(32), np.zeros(32, np.uint32)
        launch_ptx(ptx, "k", 1, 64, [x, o], schedule=schedule, seed=seed)
        assert (o == x[::-1]).all()


def test_blocks_that_end_early_leave_the_others_right():
    """40 blocks of 64 threads, of which three in four end at once (so that their lanes are dropped from the group)
    while a cp.async of all is outstanding; the others, block b, go round (7 b) % 40 times, with barriers, shared and
    local memory."""
    ptx = (
        HEAD
        + """
    .visible .entry k(.param .u64 P0, .param .u64 P1) {
      .reg .pred p; .reg .b32 t, b, n, i, s, v, w, sum; .reg .b64 a, c, l;
      .shared .align 16 .b8 sh[512]; .local .align 4 .b8 loc[64];
      mov.u32 t, %tid.x; mov.u32 b, %ctaid.x; mul.lo.u32 n, b, 7; rem.u32 n, n, 40; mov.u32 i, 0; mov.u32 sum, 0; mov.u64 l, loc; st.local.u32 [l+16], b;
      mov.u32 s, sh; mad.lo.u32 s, t, 4, s; ld.param.u64 a, [P0]; mad.wide.u32 a, t, 4, a;
      st.shared.u32 [s], b;
      cp.async.ca.shared.global [s+256], [a], 4; cp.async.commit_group;
      and.b32 v, b, 3; setp.ne.u32 p, v, 2; @p bra END;
    L: setp.ge.u32 p, i, n; @p bra OUT;
      bar.sync 0; xor.b32 w, t, 33; mov.u32 v, sh; mad.lo.u32 w, w, 4, v; ld.shared.u32 v, [w]; add.u32 sum, sum, v; bar.sync 0;
      add.u32 v, v, 1; st.shared.u32 [w], v; ld.local.u32 v, [l+16]; add.u32 v, v, 2; st.local.u32 [l+16], v; add.u32 i, i, 1; bra L;
    OUT: cp.async.wait_group 0; ld.shared.u32 v, [s+256]; add.u32 sum, sum, v; ld.local.u32 v, [l+16]; mad.lo.u32 sum, v, 1000, sum;
      ld.param.u64 c, [P1]; mad.lo.u32 t, b, 64, t; mad.wide.u32 c, t, 4, c; st.global.u32 [c], sum;
    END: ret; }"""
    )
    x = rng.integers(0, 100, 64, dtype=np.uint32)
    want = [
        (b + 2 * n) * 1000 + sum(b + i for i in range(n)) + x if b % 4 == 2 else 0 * x
        for b in range(40)
        for n in [7 * b % 40]
    ]
    for options in ({}, {"max_lanes": 640}, {"max_lanes": 1}, {"schedule": "random"}):
        o = np.zeros((40, 64), np.uint32)
        launch_ptx(ptx, "k", 40, 64, [x, o], **options)
        assert (o == np.stack(want)).all()


@pytest.mark.parametrize("schedule", ["lockstep", "random"])
def test_deadlock_is_reported(schedule):
    with pytest.raises(PtxError, match="deadlock") as e:
        run_body(
            "mov.u32 t0, %tid.x; setp.lt.u32 p, t0, 32; mov.u32 o0, 0; @p bra A; bar.sync 1; bra B; A: bar.sync 2; B:",
            [("u32", np.zeros(64, np.uint32))],
            [("u32", np.uint32)],
            schedule=schedule,
        )
    assert "barrier 1" in e.value.detail
    assert "barrier 2" in e.value.detail
    with pytest.raises(PtxError, match="step limit"):
        run_body("L: bra L;", [("u32", np.zeros(32, np.uint32))], [("u32", np.uint32)], max_steps=1000)


# ---------------------------------------------------------------- ldmatrix and mma, from the fragment tables of the ISA


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix(n, trans):
    """Rows of 8 b16 lie 16 bytes apart, in an order that the row addresses permute."""
    x = rng.integers(0, 2**16, (32, 8), dtype=np.uint16)
    order = rng.permutation(32).astype(np.uint32)
    regs = ", ".join(f"r{i}" for i in range(n))
    ptx = (
        HEAD
        + f"""
    .visible .entry k(.param .u64 P0, .param .u64 P1, .param .u64 P2) {{
      .reg .b32 t, s, v, r<4>; .reg .b64 a; .shared .align 16 .b8 m[512];
      mov.u32 t, %tid.x;
      ld.param.u64 a, [P0]; mad.wide.u32 a, t, 16, a; shl.b32 s, t, 4; mov.u32 v, m; add.u32 s, s, v;
      .reg .b64 x, y; ld.global.v2.b64 {{x, y}}, [a]; st.shared.v2.b64 [s], {{x, y}};
      bar.warp.sync -1;
      ld.param.u64 a, [P1]; mad.wide.u32 a, t, 4, a; ld.global.u32 s, [a]; shl.b32 s, s, 4; add.u32 s, s, v;
      ldmatrix.sync.aligned.m8n8.x{n}{".trans" if trans else ""}.shared.b16 {{{regs}}}, [s];
      ld.param.u64 a, [P2]; mad.wide.u32 a, t, {4 * n}, a;
      {" ".join(f"st.global.b32 [a+{4 * i}], r{i};" for i in range(n))} ret; }}"""
    )
    o = np.zeros((32, n), np.uint32)
    launch_ptx(ptx, "k", 1, 32, [x, order, o])
    for i in range(n):
        m = x[order[8 * i : 8 * i + 8]]
        if trans:
            m = m.T
        for lane in range(32):
            row, col = lane // 4, 2 * (lane % 4)
            assert o[lane, i] == int(m[row, col]) | int(m[row, col + 1]) << 16


# (lane, register, element in the register) -> (row, column), as the ISA's figures give them
def a_place(type_, lane, r, e):
    g, t = lane >> 2, lane & 3
    if type_ == "tf32":
        return g + 8 * (r % 2), t + 4 * (r // 2)
    return (g + 8 * (r % 2), 2 * t + e + (8 if r >= 2 else 0))


def b_place(type_, lane, r, e):
    g, t = lane >> 2, lane & 3
    return (t + 4 * r, g) if type_ == "tf32" else (2 * t + e + 8 * r, g)


def pack(m, type_, place, registers):
    per = 1 if type_ == "tf32" else 2
    out = np.zeros((32, registers), np.uint32)
    for lane in range(32):
        for r in range(registers):
            for e in range(per):
                out[lane, r] |= np.uint32(int(m[place(type_, lane, r, e)]) << (32 // per * e))
    return out


@pytest.mark.parametrize(("type_", "k"), [("f16", 16), ("bf16", 16), ("f16", 8), ("bf16", 8), ("tf32", 8)])
def test_mma(type_, k):
    A, B = rng.standard_normal((16, k)), rng.standard_normal((k, 8))
    C = rng.standard_normal((16, 8)).astype(np.float32)
    if type_ == "bf16":
        abits, bbits = bf16(A), bf16(B)
        A, B = bf16_value(abits), bf16_value(bbits)
    elif type_ == "f16":
        abits, bbits = A.astype(np.float16).view(np.uint16), B.astype(np.float16).view(np.uint16)
        A, B = abits.view(np.float16), bbits.view(np.float16)
    else:  # the low 13 bits are not read
        abits, bbits = A.astype(np.float32).view(np.uint32), B.astype(np.float32).view(np.uint32)
        A, B = (abits & 0xFFFFE000).view(np.float32), (bbits & 0xFFFFE000).view(np.float32)
    nb = 2 if type_ == "tf32" else k // 8
    a, b = pack(abits, type_, a_place, 2 * nb), pack(bbits, type_, b_place, nb)
    c = np.zeros((32, 4), np.uint32)
    for lane in range(32):
        g, t = lane >> 2, lane & 3
        for i in range(4):
            c[lane, i] = C.view(np.uint32)[g + 8 * (i // 2), 2 * t + i % 2]
    lists = [
        ", ".join(f"{n}{i}" for i in range(m)) for n, m in (("d", 4), ("x", 2 * nb), ("y", nb), ("c", 4))
    ]
    body = (
        ".reg .b32 x<4>, y<2>, c<4>, d<4>;"
        + "".join(f"mov.b32 x{i}, i{i};" for i in range(2 * nb))
        + "".join(f"mov.b32 y{i}, i{2 * nb + i};" for i in range(nb))
        + "".join(f"mov.b32 c{i}, i{3 * nb + i};" for i in range(4))
        + f"mma.sync.aligned.m16n8k{k}.row.col.f32.{type_}.{type_}.f32 {{{lists[0]}}}, {{{lists[1]}}}, {{{lists[2]}}}, {{{lists[3]}}};"
        + "".join(f"mov.b32 o{i}, d{i};" for i in range(4))
    )

    def two(m):
        return [
            np.concatenate([m[:, i], m[:, i][::-1]]) for i in range(m.shape[1])
        ]  # a second warp of other data

    got = run_body(body, [("b32", v) for m in (a, b, c) for v in two(m)], [("b32", np.uint32)] * 4)
    D = (A.astype(np.float64) @ B.astype(np.float64) + C).astype(np.float32).view(np.uint32)
    for lane in range(32):
        g, t = lane >> 2, lane & 3
        for i in range(4):
            assert got[i][lane] == D[g + 8 * (i // 2), 2 * t + i % 2]
