"""Asynchronous copies, loads, stores, atomics; statistics."""

# ruff: noqa: E501 (PTX stands on long lines)

import numpy as np
import pytest
import torch
from emu_util import bf16, bf16_value, run_body
from ptxemu import PtxError, launch_ptx

rng = np.random.default_rng(3)
HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n"
T = np.arange(64)


def u32(n=64):
    return rng.integers(0, 2**32, n, dtype=np.uint32)


# ---------------------------------------------------------------- cp.async

CP = (
    HEAD
    + """
.visible .entry k(.param .u64 P0, .param .u64 P1, .param .u64 P2) {
  .reg .pred p; .reg .b32 t, s, d, v, n; .reg .b64 a, b;
  .shared .align 16 .b8 buf[2048];
  mov.u32 t, %%tid.x; shl.b32 s, t, 4; mov.u32 d, buf; add.u32 s, s, d;
  ld.param.u64 a, [P0]; mad.wide.u32 a, t, 16, a;
  ld.param.u64 b, [P2]; mad.wide.u32 b, t, 4, b; ld.global.u32 n, [b];
  setp.eq.u32 p, n, 0;
  %s
  ld.param.u64 b, [P1]; mad.wide.u32 b, t, 16, b;
  .reg .b32 w<4>; ld.shared.v4.b32 {w0,w1,w2,w3}, [s]; st.global.v4.b32 [b], {w0,w1,w2,w3};
  ret; }"""
)


def run_cp(body, sizes=None, n=64, **options):
    x, o = u32(4 * n), np.zeros(4 * n, np.uint32)
    launch_ptx(CP % body, "k", 1, n, [x, o, np.full(n, 16, np.uint32) if sizes is None else sizes], **options)
    return x.reshape(n, 4), o.reshape(n, 4)


def test_cp_async_arrives_at_the_wait():
    x, o = run_cp("cp.async.cg.shared.global [s], [a], 16; cp.async.commit_group; cp.async.wait_group 0;")
    assert (x == o).all()
    x, o = run_cp(
        "cp.async.ca.shared.global [s], [a], 8; cp.async.ca.shared.global.L2::128B [s+8], [a+8], 4; cp.async.ca.shared.global [s+12], [a+12], 4; cp.async.wait_all;"
    )
    assert (x == o).all()
    for body in (
        "cp.async.cg.shared.global [s], [a], 16; cp.async.commit_group;",  # no wait
        "cp.async.cg.shared.global [s], [a], 16; cp.async.commit_group; cp.async.wait_group 1;",  # waits for the wrong one
        "cp.async.cg.shared.global [s], [a], 16; cp.async.wait_group 0;",  # not committed
        "mov.u32 v, 0; st.shared.v4.b32 [s], {v,v,v,v}; cp.async.cg.shared.global [s], [a], 16; cp.async.commit_group;",
    ):
        with pytest.raises(PtxError, match="never written"):
            run_cp(body)


def test_cp_async_groups_complete_in_order():
    body = """cp.async.cg.shared.global [s], [a], 16; cp.async.commit_group; cp.async.cg.shared.global [s+1024], [a], 16; cp.async.commit_group; cp.async.wait_group 1;"""
    x, o = run_cp(body)
    assert (x == o).all()


def test_cp_async_src_size_and_ignore():
    sizes = np.resize(np.array([16, 0, 3, 8, 15, 1], np.uint32), 64)
    x, o = run_cp("cp.async.cg.shared.global [s], [a], 16, n; cp.async.wait_all;", sizes)
    keep = np.arange(16) < sizes[:, None]
    assert (o.view(np.uint8) == np.where(keep, x.view(np.uint8), 0)).all()
    x, o = run_cp("cp.async.cg.shared.global [s], [a], 16, p; cp.async.wait_all;", sizes)
    assert (o == np.where(sizes[:, None] == 0, 0, x)).all()
    n = 64  # size 0 may point anywhere
    x, o = run_cp(
        "setp.eq.u32 p, n, 0; @p mov.u64 a, 64; cp.async.cg.shared.global [s], [a], 16, n; cp.async.wait_all;",
        np.where(np.arange(n) < 5, 0, 16).astype(np.uint32),
    )
    assert (o[:5] == 0).all()
    assert (o[5:] == x[5:]).all()


# ---------------------------------------------------------------- loads, stores, atomics


def test_load_store_widths_and_extension():
    x = rng.integers(-(2**31), 2**31, 64).astype(np.int32)
    got = run_body(
        "ld.param.u64 a, [P0]; mad.wide.u32 a, tid, 4, a; ld.global.s8 o0, [a+1]; ld.global.u8 o1, [a+1]; ld.global.s16 o2, [a+2]; ld.global.nc.L1::no_allocate.L2::128B.u16 o3, [a+2]; ld.volatile.global.u32 o4, [a]; ld.s8 o5, [a+3];",
        [("s32", x)],
        [
            ("s32", np.int32),
            ("u32", np.uint32),
            ("s32", np.int32),
            ("u32", np.uint32),
            ("u32", np.uint32),
            ("s64", np.int64),
        ],
    )
    b = x.view(np.int8).reshape(-1, 4)
    h = x.view(np.int16).reshape(-1, 2)
    for g, want in zip(
        got,
        [b[:, 1], b[:, 1].view(np.uint8), h[:, 1], h[:, 1].view(np.uint16), x.view(np.uint32), b[:, 3]],
        strict=True,
    ):
        assert (g == want).all()


def test_hints_and_instructions_without_effect():
    x = u32()
    got = run_body(
        """
        .reg .b64 pol, e; .reg .b32 v<4>; .shared .align 16 .b8 sh[1024];
        createpolicy.fractional.L2::evict_first.b64 pol, 1.0;
        ld.param.u64 e, [P0]; mad.wide.u32 e, tid, 4, e;
        ld.global.L1::evict_last.L2::cache_hint.b32 o0, [e], pol; ld.global.cg.b32 o1, [e]; ld.global.nc.L1::no_allocate.L2::evict_first.v1.b32 o2, [e];
        ld.relaxed.gpu.global.u32 o3, [e]; ld.acquire.sys.global.u32 o4, [e]; fence.acq_rel.gpu; fence.sc.sys; membar.gl; nanosleep.u32 20; griddepcontrol.wait;
        mov.u32 t0, sh; mad.lo.u32 t0, tid, 4, t0; cp.async.ca.shared.global.L2::cache_hint [t0], [e], 4, pol; cp.async.ca.shared.global.L2::cache_hint [t0+512], [e], 4, 4, pol; cp.async.wait_all;
        ld.shared.u32 o5, [t0]; ld.shared.u32 o6, [t0+512];
        st.global.L1::no_allocate.L2::cache_hint.b32 [e], o0, pol; red.global.add.L2::cache_hint.u32 [e], 0, pol;
        mov.u32 t1, %clock; mov.u32 t2, %clock; sub.u32 o7, t2, t1;""".replace(".v1", ""),
        [("u32", x)],
        [("u32", np.uint32)] * 8,
    )
    for g in got[:7]:
        assert (g == x).all()
    assert (got[7] > 0).all()
    with pytest.raises(PtxError, match="trap") as e:
        run_body("setp.eq.u32 p, tid, 40; @p trap; mov.u32 o0, 0;", [("u32", x)], [("u32", np.uint32)])
    assert e.value.thread == (40, 0, 0)


def test_lanes_in_different_buffers_and_overlapping_views():
    ptx = (
        HEAD
        + """
    .visible .entry k(.param .u64 P0, .param .u64 P1, .param .u64 P2, .param .u64 P3) {
      .reg .pred p; .reg .b32 t, v; .reg .b64 a, b, c;
      mov.u32 t, %tid.x; and.b32 v, t, 1; setp.eq.u32 p, v, 0; ld.param.u64 a, [P0]; ld.param.u64 b, [P1]; selp.b64 a, a, b, p;
      mad.wide.u32 a, t, 4, a; ld.global.u32 v, [a]; ld.param.u64 c, [P3]; mad.wide.u32 c, t, 4, c; st.global.u32 [c], v;
      ld.param.u64 b, [P2]; mad.wide.u32 b, t, 4, b; ld.global.u32 v, [b]; st.global.u32 [c+256], v; add.u32 v, v, 1; st.global.u32 [a], v; ret; }"""
    )
    base, y, o = (
        np.arange(1000, 1200, dtype=np.uint32),
        np.arange(2000, 2064, dtype=np.uint32),
        np.zeros(128, np.uint32),
    )
    launch_ptx(ptx, "k", 1, 64, [base[40:104], y, base[50:114], o])  # the third argument overlaps the first
    assert (o[:64] == np.where(T % 2 == 0, 1040 + T, 2000 + T)).all()
    assert (o[64:] == 1050 + T).all()
    assert (y == np.where(T % 2 == 0, 2000 + T, 1051 + T)).all()
    assert (base[40:104] == np.where(T % 2 == 0, 1051 + T, 1040 + T)).all()
    with pytest.raises(PtxError, match="out of bounds"):
        launch_ptx(ptx, "k", 1, 64, [base[40:104], y[:63], base[50:114], o])
    with pytest.raises(PtxError, match="misaligned"):
        launch_ptx(
            ptx.replace("mad.wide.u32 a, t, 4, a; ld", "mad.wide.u32 a, t, 6, a; ld"),
            "k",
            1,
            8,
            [base, y, base, o],
        )


def test_kernel_parameters_of_every_size():
    ptx = (
        HEAD
        + """
    .visible .entry k(.param .u8 A, .param .u16 B, .param .f64 C, .param .align 8 .b8 S[24], .param .f32 F, .param .u64 O) {
      .reg .b16 h; .reg .b32 v, w; .reg .b64 a, x, y; .reg .f64 d; .reg .f32 f;
      ld.param.u64 a, [O]; ld.param.u8 v, [A]; st.global.u32 [a], v; ld.param.s8 v, [A]; st.global.u32 [a+4], v; ld.param.u16 v, [B]; st.global.u32 [a+8], v;
      ld.param.v2.u32 {v, w}, [S+8]; st.global.v2.u32 [a+16], {v, w}; ld.param.f64 d, [C]; st.global.f64 [a+24], d; ld.param.f32 f, [F]; st.global.f32 [a+32], f;
      mov.b64 x, S; ld.param.u32 v, [x+20]; st.global.u32 [a+36], v; ret; }"""
    )
    o = np.zeros(10, np.uint32)
    launch_ptx(ptx, "k", 1, 32, [200, 60000, -1.5, np.arange(6, dtype=np.uint32).tobytes(), 0.1, o])
    assert o[:3].tolist() == [200, 2**32 - 56, 60000]
    assert o[4:6].tolist() == [2, 3]
    assert o[6:8].view(np.float64)[0] == -1.5
    assert o[8:9].view(np.float32)[0] == np.float32(0.1)
    assert o[9] == 5


def test_generic_addresses_and_local_memory():
    """Pointers to shared, local and global memory used without a space, chosen per lane."""
    ptx = (
        HEAD
        + """
    .visible .entry k(.param .u64 P0, .param .u64 P1) {
      .reg .pred p; .reg .b32 t, v, s; .reg .b64 a, b, c, l;
      .shared .align 4 .b8 sh[256]; .local .align 8 .b8 loc[16];
      mov.u32 t, %tid.x; ld.param.u64 a, [P0]; cvta.to.global.u64 a, a; mad.wide.u32 a, t, 4, a; ld.global.u32 v, [a];
      mov.u32 s, sh; shl.b32 v, t, 2; add.u32 s, s, v; mul.lo.u32 v, t, 10; st.shared.u32 [s], v;
      cvt.u64.u32 b, s; cvta.shared.u64 b, b;
      mov.u64 l, loc; cvta.local.u64 c, l; mul.lo.u32 v, t, 100; st.local.u32 [l+8], v; add.u64 c, c, 8;
      and.b32 s, t, 1; setp.eq.u32 p, s, 0; @p mov.u64 a, b;
      and.b32 s, t, 3; setp.eq.u32 p, s, 1; @p mov.u64 a, c;
      ld.u32 v, [a]; add.u32 v, v, 1; st.u32 [a], v;
      ld.param.u64 b, [P1]; mad.wide.u32 b, t, 4, b; ld.u32 v, [a]; isspacep.shared p, a; @p add.u32 v, v, 1000000; st.global.u32 [b], v; ret; }"""
    )
    x, o = u32(), np.zeros(64, np.uint32)
    before = x.copy()
    launch_ptx(ptx, "k", 1, 64, [x, o])
    want = np.where(T % 2 == 0, T * 10 + 1000000, np.where(T % 4 == 1, T * 100, before)) + 1
    assert (o == want.astype(np.uint32)).all()
    assert (x == np.where(T % 4 == 3, before + 1, before)).all()


@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomics(space):
    n = 64
    key, val = rng.integers(0, 8, n, dtype=np.uint32), rng.integers(0, 100, n, dtype=np.uint32)
    ops = ["add.u32", "min.u32", "max.u32", "and.b32", "or.b32", "xor.b32", "exch.b32", "inc.u32", "dec.u32"]
    for op in ops:
        ptx = (
            HEAD
            + f"""
        .visible .entry k(.param .u64 P0, .param .u64 P1, .param .u64 P2, .param .u64 P3) {{
          .reg .b32 t, key, val, s, old; .reg .b64 a, b; .shared .align 4 .b8 sh[32]; .reg .pred p;
          mov.u32 t, %tid.x; setp.lt.u32 p, t, 8; mov.u32 s, sh;
          ld.param.u64 a, [P2]; mad.wide.u32 a, t, 4, a; @p ld.global.u32 val, [a]; mad.lo.u32 s, t, 4, s; @p st.shared.u32 [s], val; bar.sync 0;
          ld.param.u64 a, [P0]; mad.wide.u32 a, t, 4, a; ld.global.u32 key, [a];
          ld.param.u64 a, [P1]; mad.wide.u32 a, t, 4, a; ld.global.u32 val, [a];
          ld.param.u64 b, [P2]; mad.wide.u32 b, key, 4, b; mov.u32 s, sh; mad.lo.u32 s, key, 4, s;
          atom.{space}.{op} old, [{"b" if space == "global" else "s"}], val;
          ld.param.u64 a, [P3]; mad.wide.u32 a, t, 4, a; st.global.u32 [a], old;
          bar.sync 0; mov.u32 s, sh; mad.lo.u32 s, t, 4, s; @p ld.shared.u32 val, [s];
          ld.param.u64 b, [P2]; mad.wide.u32 b, t, 4, b; {"" if space == "global" else "@p st.global.u32 [b], val;"} ret; }}"""
        )
        m, old = rng.integers(0, 100, 8, dtype=np.uint32), np.zeros(n, np.uint32)
        ref, ref_old = [int(v) for v in m], []
        f = {
            "add": lambda a, b: (a + b) % 2**32,
            "min": min,
            "max": max,
            "and": lambda a, b: a & b,
            "or": lambda a, b: a | b,
            "xor": lambda a, b: a ^ b,
            "exch": lambda a, b: b,
            "inc": lambda a, b: 0 if a >= b else a + 1,
            "dec": lambda a, b: b if a == 0 or a > b else a - 1,
        }[op.split(".")[0]]
        for k_, v in zip(key, val, strict=True):
            ref_old.append(ref[k_])
            ref[k_] = f(ref[k_], int(v))
        launch_ptx(ptx, "k", 1, n, [key, val, m, old])
        assert (m.tolist(), old.tolist()) == (ref, ref_old), op


def test_float_and_cas_atomics():
    x = rng.integers(-50, 50, 64).astype(np.float32)
    acc, half, bf = np.zeros(8, np.float32), np.zeros(4, np.float16), np.zeros(4, np.uint16)
    lock, old = np.zeros(2, np.uint64), np.zeros(64, np.float16)
    ptx = (
        HEAD
        + """
    .visible .entry k(.param .u64 P0, .param .u64 P1, .param .u64 P2, .param .u64 P3, .param .u64 P4, .param .u64 P5) {
      .reg .b32 t, v, h; .reg .b16 s; .reg .b64 a, b, c, d, e;
      mov.u32 t, %tid.x; ld.param.u64 a, [P0]; mad.wide.u32 a, t, 4, a; ld.global.f32 v, [a];
      ld.param.u64 b, [P1]; red.global.add.f32 [b], v; atom.global.gpu.acq_rel.add.f32 h, [b+4], v; red.relaxed.gpu.global.add.f32 [b+8], 0f3F800000;
      cvt.rn.f16x2.f32 h, 0f3F800000, v; ld.param.u64 c, [P2]; red.global.add.noftz.f16x2 [c], h;
      cvt.rn.f16.f32 s, 0f3F800000; atom.global.add.noftz.f16 s, [c+6], s; ld.param.u64 a, [P5]; mad.wide.u32 a, t, 2, a; st.global.b16 [a], s;
      ld.param.u64 c, [P4]; cvt.rn.bf16x2.f32 h, 0f3F800000, v; red.global.add.noftz.bf16x2 [c], h; cvt.rn.bf16.f32 s, 0f40000000; red.global.add.noftz.bf16 [c+4], s;
      ld.param.u64 d, [P3]; cvt.u64.u32 e, t; add.u64 c, e, 1; atom.global.cas.b64 e, [d], e, c; ret; }"""
    )
    launch_ptx(ptx, "k", 1, 64, [x, acc, half, lock, bf, old])
    assert acc.tolist() == [x.sum(), x.sum(), 64, 0, 0, 0, 0, 0]
    assert half.tolist() == [x.sum(), 64, 0, 64]
    assert lock.tolist() == [64, 0]
    assert old.tolist() == list(range(64))
    total = np.float32(0)
    for v in x:  # bf16 rounds at every step, in lane order
        total = bf16_value(bf16(total + v))
    assert bf16_value(bf).tolist() == [total, 64, 128, 0]


def test_module_variables_and_functions():
    ptx = (
        HEAD
        + """
    .global .align 4 .u32 counter = 7;
    .const .align 4 .f32 table[4] = {0f3F800000, 0f40000000, 2.5, 4.0};
    .global .align 8 .u64 pointer = counter;
    .global .align 8 .f64 doubles[2] = {0d3FF8000000000000, 0dBFF0000000000000};
    .func (.param .b32 ret) twice_plus(.param .b32 x, .param .b64 y) {
      .reg .b32 a; .reg .b64 b; .reg .pred p;
      ld.param.u32 a, [x]; ld.param.u64 b, [y]; setp.gt.u32 p, a, 40; @p bra BIG; add.u32 a, a, a; st.param.b32 [ret], a; ret;
      BIG: cvt.u32.u64 a, b; st.param.b32 [ret+0], a; ret; }
    .visible .entry k(.param .u64 P0, .param .u64 P1) {
      .reg .b32 t, v, w, i; .reg .b64 a, b, c; .reg .f32 f, g;
      mov.u32 t, %tid.x; cvt.u64.u32 c, t;
      { .param .b32 p0; st.param.b32 [p0], t; .param .b64 p1; st.param.b64 [p1], c; .param .b32 r0; call.uni (r0), twice_plus, (p0, p1); ld.param.b32 v, [r0]; }
      { .param .b32 p0; st.param.b32 [p0+0], v; .param .b64 p1; st.param.b64 [p1], 5; .param .b32 r0; call (r0), twice_plus, (p0, p1); ld.param.b32 w, [r0]; }
      ld.param.u64 a, [P0]; mad.wide.u32 a, t, 4, a; st.global.u32 [a], w;
      ld.global.u64 b, [pointer]; atom.add.u32 v, [b], 1;
      .reg .f64 d0, d1; ld.f64 d0, [doubles]; ld.global.f64 d1, [doubles+8]; add.f64 d0, d0, d1; cvt.rn.f32.f64 g, d0;
      and.b32 i, t, 3; mul.wide.u32 c, i, 4; mov.u64 b, table; add.u64 b, b, c; ld.const.f32 f, [b];
      ld.param.u64 a, [P1]; mad.wide.u32 a, t, 4, a; add.f32 f, f, g; st.global.f32 [a], f; ret; }"""
    )
    o, f = np.zeros(64, np.uint32), np.zeros(64, np.float32)
    launch_ptx(ptx, "k", 1, 64, [o, f])

    def g(x, y):
        return x * 2 if x <= 40 else y

    assert o.tolist() == [g(g(t, t), 5) for t in range(64)]
    assert (f == np.array([1.5, 2.5, 3, 4.5], np.float32)[T % 4]).all()


def test_brx_and_scopes():
    got = run_body(
        """
        and.b32 t0, tid, 3;
        ts: .branchtargets A, B, C, A;
        brx.idx t0, ts;
     A: mov.u32 o0, 1; bra X;
     B: { .reg .b32 t0; mov.u32 t0, 22; X1: mov.u32 o0, t0; } bra X;
     C: { .reg .b32 t0; mov.u32 t0, 33; X1: mov.u32 o0, t0; }
     X: mad.lo.u32 o0, t0, 100, o0;""",
        [("u32", np.zeros(64, np.uint32))],
        [("u32", np.uint32)],
    )
    assert (got == T % 4 * 100 + np.array([1, 22, 33, 1])[T % 4]).all()


def test_grid_and_block_in_three_dimensions_both_schedules():
    ptx = (
        HEAD
        + """
    .visible .entry k(.param .u64 P0) { .reg .b32 x<12>; .reg .b64 a;
      mov.u32 x0, %tid.x; mov.u32 x1, %tid.y; mov.u32 x2, %tid.z; mov.u32 x3, %ntid.x; mov.u32 x4, %ntid.y; mov.u32 x5, %ntid.z;
      mad.lo.u32 x6, x2, x4, x1; mad.lo.u32 x6, x6, x3, x0; mul.lo.u32 x7, x3, x4; mul.lo.u32 x7, x7, x5;
      mov.u32 x8, %ctaid.z; mov.u32 x9, %nctaid.y; mov.u32 x10, %ctaid.y; mad.lo.u32 x8, x8, x9, x10; mov.u32 x9, %nctaid.x; mov.u32 x10, %ctaid.x; mad.lo.u32 x8, x8, x9, x10;
      mad.lo.u32 x7, x8, x7, x6; ld.param.u64 a, [P0]; mad.wide.u32 a, x7, 4, a; add.u32 x7, x7, 5; st.global.u32 [a], x7; ret; }"""
    )
    for options in ({}, {"schedule": "random"}, {"max_lanes": 1}):
        o = np.zeros(2 * 3 * 4 * 5 * 3 * 2, np.uint32)
        launch_ptx(ptx, "k", (2, 3, 4), (5, 3, 2), [o], **options)
        assert (o == np.arange(len(o)) + 5).all()


def test_statistics():
    """Counts that can be worked out by hand: 64 lanes read 4 bytes each, stride 1 and stride 32 bytes."""
    ptx = (
        HEAD
        + """
    .visible .entry k(.param .u64 P0) { .reg .b32 t, v, s; .reg .b64 a, b; .shared .align 16 .b8 sh[8192];
      mov.u32 t, %tid.x; ld.param.u64 a, [P0]; mad.wide.u32 b, t, 4, a; ld.global.f32 v, [b]; mad.wide.u32 b, t, 32, a; ld.global.f32 v, [b];
      ex2.approx.f32 v, v; fma.rn.f32 v, v, v, v;
      mov.u32 s, sh; mad.lo.u32 s, t, 4, s; st.shared.f32 [s], v; mov.u32 s, sh; mad.lo.u32 s, t, 128, s; st.shared.f32 [s], v; bar.sync 0; ret; }"""
    )
    s = launch_ptx(ptx, "k", 1, 64, [torch.zeros(512)])  # (torch's memory is 64-byte aligned)
    assert s["global bytes read"] == 512
    assert s["global sectors read"] == 8 + 64
    assert s["ex2"] == 64
    assert s["fma"] == 64
    assert s["barrier (threads)"] == 64
    assert "512  global bytes read" in str(s)
    assert s["shared bytes written"] == 512
    assert s["shared bank conflicts"] == 2 * 31
