"""Planted faults: each must be caught, and the error must say where."""

# PTX stands on long lines; lambdas of a loop run in their own turn of it.
# ruff: noqa: E501, B023

import os
import re

import pytest
import torch
from ptxemu import CudaLibrary, PtxError, launch_ptx
from ptxemu.cuda_front import CUDA_HOME

HERE = os.path.dirname(os.path.abspath(__file__))
needs_nvcc = pytest.mark.skipif(
    not os.path.exists(os.path.join(CUDA_HOME, "bin", "nvcc")), reason="needs nvcc"
)
SEEDS = range(5)


def broken(*replacements):
    """emu_kernels.cu with faults planted."""
    with open(os.path.join(HERE, "emu_kernels.cu")) as f:
        text = f.read()
    for old, new in replacements:  # the first place, however it is laid out
        text, found = re.subn(r"\s+".join(map(re.escape, old.split())), lambda _, new=new: new, text, count=1)
        assert found, old
    return CudaLibrary(text)


def outcome(run):
    """The kind of the error that run() raises, or "wrong" / "right" by what it returns."""
    try:
        return "right" if run() else "wrong"
    except PtxError as e:
        return e.kind


def softmax_is_right(lib, **options):
    torch.manual_seed(0)
    x, y = torch.randn(2, 500) * 3, torch.zeros(2, 500)
    lib.call("softmax", x, y, 2, 500, 128, None, **options)
    return (y - x.double().softmax(-1)).abs().max() < 1e-6


def attention_is_right(lib, **options):
    torch.manual_seed(0)
    qo, ko = torch.tensor([0, 64]), torch.tensor([0, 200])
    q, o, k, v = (torch.randn(n, 64).bfloat16() for n in (64, 64, 200, 200))
    lib.call("attention", q, k, v, o, qo, ko, 1, 64, 0.125, **options)
    want = torch.softmax(q.double() @ k.double().T * 0.125, -1) @ v.double()
    return ((o.double() - want).abs().max() / want.abs().max()) < 1.2e-2


# ---------------------------------------------------------------- barriers


@needs_nvcc
@pytest.mark.parametrize(
    ("fault", "kinds"),
    [
        # results of the other warps are read before they are there
        (("part[t / 32] = m; __syncthreads();", "part[t / 32] = m;"), {"never written"}),
        # a fast warp overwrites what a slow one still reads: no error, but a wrong result
        (("m = fmaxf(m, part[w]); __syncthreads();", "m = fmaxf(m, part[w]);"), {"wrong"}),
    ],
)
def test_missing_barrier(fault, kinds):
    lib = broken(fault)
    assert outcome(lambda: softmax_is_right(lib)) == "race"  # the race check needs no luck with the order
    assert outcome(lambda: softmax_is_right(lib, races=False)) == "right"  # in lockstep nothing else shows it
    got = {outcome(lambda: softmax_is_right(lib, schedule="random", seed=s, races=False)) for s in SEEDS}
    assert got & kinds
    assert got <= kinds | {"right"}


@needs_nvcc
def test_missing_barrier_before_a_buffer_is_reused():
    lib = broken(("} } __syncthreads(); }", "} } }"))
    assert outcome(lambda: attention_is_right(lib)) == "race"
    got = {outcome(lambda: attention_is_right(lib, schedule="random", seed=s, races=False)) for s in SEEDS}
    assert got & {"never written", "wrong"}, got


@needs_nvcc
def test_intact_kernels_pass_every_seed():
    lib = broken()
    for s in SEEDS:
        assert outcome(lambda: softmax_is_right(lib, schedule="random", seed=s)) == "right"
        assert outcome(lambda: attention_is_right(lib, schedule="random", seed=s)) == "right"


# ---------------------------------------------------------------- cp.async


@needs_nvcc
@pytest.mark.parametrize(
    "fault",
    [
        ('asm volatile("cp.async.wait_group 1;\\n")', "(void)0"),
        ('asm volatile("cp.async.wait_group 0;\\n")', "(void)0"),
        ("wait_group 1", "wait_group 2"),
        ('asm volatile("cp.async.commit_group;\\n");', ""),
    ],
)
def test_missing_wait(fault):
    lib = broken(fault)
    assert outcome(lambda: attention_is_right(lib)) == "never written"


def triton_matmul_ptx():
    pytest.importorskip("triton")
    import emu_triton_kernels as K
    from ptxemu import launch_triton, triton_front

    torch.manual_seed(0)
    a, b, c = torch.randn(64, 256).bfloat16(), torch.randn(256, 64).bfloat16(), torch.zeros(64, 64)
    launch_triton(
        K.matmul, (1, 1), a, b, c, 64, 64, 256, 256, 64, 64, BM=64, BN=64, BK=32, PREC="ieee", num_stages=3
    )
    ptx, shared = triton_front.last["ptx"], triton_front.last["shared"]

    def run(text, **options):
        c.zero_()
        launch_ptx(text, "matmul", 1, 128, [a, b, c, 64, 64, 256, 256, 64, 64, None, None], shared, **options)
        return (c - a.double() @ b.double()).abs().max() < 1e-4

    return ptx, run


def test_triton_matmul_without_its_waits_or_barriers():
    """Delete waits and barriers of a software-pipelined Triton matmul. (Triton 3.9 emits one barrier and
    several waits here that the ones before them already cover; deleting only those changes nothing.)"""
    ptx, run = triton_matmul_ptx()
    assert outcome(lambda: run(ptx)) == "right"
    assert outcome(lambda: run(ptx, schedule="random")) == "right"
    lines = ptx.split("\n")
    waits = [i for i, l in enumerate(lines) if "cp.async.wait_group" in l]
    barriers = [i for i, l in enumerate(lines) if "bar.sync" in l]

    def without(*gone):
        return "\n".join(l for i, l in enumerate(lines) if i not in gone)

    assert outcome(lambda: run(without(waits[0]))) == "never written"
    assert outcome(lambda: run(without(*waits[1:]))) == "never written"
    for options in [[{}], [{"schedule": "random", "seed": s, "races": False} for s in SEEDS]]:
        caught = [
            any(outcome(lambda: run(without(i), **o)) in ("never written", "wrong", "race") for o in options)
            for i in barriers
        ]
        assert len(barriers) >= 6
        assert sum(caught) >= len(barriers) - 1, caught


def test_what_is_a_race_and_what_is_not():
    """The body runs in 2 warps of a block; s is each thread's own word, z word 0, p is true in warp 1."""
    head = "and.b32 t, t, 63; mov.u32 s, sh; mov.u32 v, 7; shr.u32 w0, t, 5; setp.eq.u32 p, w0, 1; mad.lo.u32 w1, t, 4, s; st.shared.u32 [w1], t; bar.sync 0;\n"
    cases = [
        ("@p st.shared.u32 [s], v; ld.shared.u32 w2, [s];", "race"),  # one warp writes what another reads
        ("ld.shared.u32 w2, [s]; @p st.shared.u32 [s], v;", "race"),  # reads first, is overwritten
        ("@p st.shared.u32 [s], v; bar.sync 0; ld.shared.u32 w2, [s];", "right"),
        ("ld.shared.u32 w2, [s]; bar.sync 0; @p st.shared.u32 [s], v;", "right"),
        ("st.shared.u32 [s], w0;", "race"),
        ("st.shared.u32 [s], v;", "right"),
        ("mov.u32 v, 0; st.shared.u32 [s], v;", "right"),
        ("ld.shared.u32 w2, [w1]; st.shared.u32 [w1], v;", "right"),  # a warp's own words
        ("@p st.shared.u8 [s+1], v; @!p st.shared.u8 [s], v;", "right"),
        ("@p st.shared.u8 [s+1], v; @!p ld.shared.u16 w2, [s];".replace("w2", "h"), "race"),
        ("@p st.volatile.shared.u32 [s], v; ld.volatile.shared.u32 w2, [s];", "right"),
        ("atom.shared.add.u32 w2, [s], 1;", "right"),
        ("@p st.shared.u32 [s], v; bar.warp.sync -1; ld.shared.u32 w2, [s];", "race"),
        ("ld.shared.u32 w2, [s+4]; @p st.shared.u32 [s], v;", "right"),
    ]
    for body, want in cases:
        for options in ({}, {"schedule": "random"}, {"max_lanes": 1}):
            z = torch.zeros(128)
            got = outcome(
                lambda: launch_ptx(
                    simple(".reg .b16 h;" + head + body), "victim", 2, 64, [z, z.clone()], **options
                )
            )
            assert got == want, (body, got, want)


def test_what_is_a_race_between_blocks_and_what_is_not():
    """Three blocks of 32; x and b are each thread's own word of P0 and P1, a and the first word of P0."""
    head = "mov.u32 s, %ctaid.x; setp.eq.u32 p, s, 1;\n"
    cases = [
        ("st.global.u32 [b], t;", "right"),
        ("ld.global.u32 v, [x]; st.global.u32 [x], t;", "right"),  # its own word
        ("st.global.u32 [a], t;", "race"),
        ("st.global.u32 [a], 7;", "race"),  # the same value, but by each block
        ("@p st.global.u32 [a], t;", "right"),  # threads of one block
        ("@p st.global.u32 [a], 7; ld.global.u32 v, [a];", "race"),
        ("ld.global.u32 v, [a]; @p st.global.u32 [a], 7;", "race"),  # is read before it is written
        ("ld.global.u16 h, [a+2]; @p st.global.u16 [a], 7;", "right"),
        ("ld.global.u8 h, [a+1]; @p st.global.u16 [a], 7;", "race"),
        ("@p st.global.v2.u32 [a], {t, t}; ld.global.u32 v, [a+4];", "race"),
        ("atom.global.add.u32 v, [a], 1;", "right"),
        ("@p st.relaxed.gpu.global.u32 [a], 7; ld.relaxed.gpu.global.u32 v, [a];", "right"),
        ("mov.u32 w0, sh; cp.async.ca.shared.global [w0], [a], 4; @p st.global.u32 [a], 7;", "race"),
    ]
    for body, want in cases:
        ptx = simple(".reg .b16 h;" + head + body, n=32)
        for options in ({}, {"schedule": "random"}, {"max_lanes": 1}):
            arguments = [torch.zeros(96), torch.zeros(96)]
            assert outcome(lambda: launch_ptx(ptx, "victim", 3, 32, arguments, **options)) == want, body
    with pytest.raises(
        PtxError, match="race: write by block 1 of global memory that block 0 has written"
    ) as e:
        launch_ptx(
            simple(".reg .b16 h;" + head + cases[2][0], n=32),
            "victim",
            3,
            32,
            [torch.zeros(96), torch.zeros(96)],
            max_lanes=1,
        )
    assert "P0 (torch.float32 [96])" in e.value.buffer
    assert (e.value.block, e.value.offset) == ((1, 0, 0), 0)


# ---------------------------------------------------------------- memory

HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n"


def simple(body, n=64, shared=64):
    return (
        HEAD
        + f""".visible .entry victim(.param .u64 P0, .param .u64 P1) {{
  .reg .pred p; .reg .b32 t, v, s, w<4>; .reg .b64 a, b, x;
  .shared .align 16 .b8 sh[{shared * 4}];
  mov.u32 t, %tid.x; mov.u32 s, %ctaid.x; mad.lo.u32 t, s, {n}, t;
  ld.param.u64 a, [P0]; ld.param.u64 b, [P1];
  mad.wide.u32 x, t, 4, a; mad.wide.u32 b, t, 4, b;
{body}
  ret; }}"""
    )


def test_off_by_one_load_says_where():
    ptx = simple("  ld.global.f32 v, [x+4];\n  st.global.f32 [b], v;")
    with pytest.raises(PtxError) as e:
        launch_ptx(ptx, "victim", 2, 64, [torch.zeros(128), torch.zeros(128)])
    e = e.value
    assert (e.kind, e.kernel, e.text, e.block, e.thread, e.offset) == (
        "out of bounds",
        "victim",
        "ld.global.f32 v, [x+4]",
        (1, 0, 0),
        (63, 0, 0),
        0,
    )
    assert ptx.split("\n")[e.line - 1].strip() == "ld.global.f32 v, [x+4];"
    assert "P0 (torch.float32 [128])" in e.buffer
    assert "reaches 4 bytes past its end" in e.detail
    assert all(
        s in str(e) for s in ("victim", f"line {e.line}", "block (1, 0, 0)", "thread (63, 0, 0)", "0x")
    )


def test_store_before_the_start_and_far_away():
    for body, words in (
        ("st.global.f32 [b+-8], 0f00000000;", "starts 8 bytes before"),
        ("mov.u64 b, 0x1234500; ld.global.f32 v, [b];", "before"),
        ("mov.u64 b, 0; st.f32 [b], v;", "before"),
    ):
        with pytest.raises(PtxError, match="out of bounds") as e:
            launch_ptx(simple(body), "victim", 1, 64, [torch.zeros(64), torch.zeros(64)])
        assert words in e.value.detail
        assert e.value.thread == (0, 0, 0)


def test_view_of_a_tensor_has_its_own_bounds():
    base = torch.arange(200.0)
    out = torch.zeros(64)
    launch_ptx(simple("ld.global.f32 v, [x]; st.global.f32 [b], v;"), "victim", 1, 64, [base[10:74], out])
    assert torch.equal(out, base[10:74])
    with pytest.raises(PtxError, match="out of bounds"):
        launch_ptx(
            simple("ld.global.f32 v, [x+4]; st.global.f32 [b], v;"), "victim", 1, 64, [base[10:74], out]
        )


def test_empty_tensor():
    out = torch.zeros(64)
    body = "setp.gt.u32 p, t, {}; mov.u32 v, 0; @p ld.global.f32 v, [x]; st.global.f32 [b], v;"
    launch_ptx(simple(body.format(63)), "victim", 1, 64, [torch.zeros(0), out])
    with pytest.raises(PtxError, match="out of bounds") as e:
        launch_ptx(simple(body.format(62)), "victim", 1, 64, [torch.zeros(0), out])
    assert e.value.thread == (63, 0, 0)


def test_wrong_mask():
    n = 60
    for bound, kind in ((n, None), (n + 1, "out of bounds")):
        ptx = simple(f"setp.lt.u32 p, t, {bound}; @p ld.global.f32 v, [x]; @p st.global.f32 [b], v;")
        x, o = torch.randn(n), torch.zeros(n)
        if kind:
            with pytest.raises(PtxError, match=kind) as e:
                launch_ptx(ptx, "victim", 1, 64, [x, o])
            assert e.value.thread == (n, 0, 0)
        else:
            launch_ptx(ptx, "victim", 1, 64, [x, o])
            assert torch.equal(x, o)


def test_wrong_mask_in_triton():
    pytest.importorskip("triton")
    import emu_triton_kernels as K
    from ptxemu import launch_triton

    x, y, o = torch.randn(1000), torch.randn(1000), torch.zeros(1000)
    with pytest.raises(PtxError, match="out of bounds"):
        launch_triton(K.add, (1,), x, y, o, 1001, BLOCK=1024)
    with pytest.raises(PtxError, match="out of bounds"):
        launch_triton(K.add, (1,), x, y[:999], o, 1000, BLOCK=1024)
    launch_triton(K.add, (1,), x, y, o, 999, BLOCK=1024)  # too narrow: seen in the result
    assert o[999] == 0
    assert x[999] + y[999] != 0


def test_shared_memory_faults():
    address = "mov.u32 s, sh; mad.lo.u32 s, t, 4, s;"
    cases = [
        ("ld.shared.u32 v, [s]; st.global.u32 [b], v;", "never written"),
        (
            "setp.ne.u32 p, t, 5; @p st.shared.u32 [s], t; bar.sync 0; ld.shared.u32 v, [s]; st.global.u32 [b], v;",
            "never written",
        ),
        ("st.shared.u32 [s+4], t;", "out of bounds"),
        ("st.shared.v2.u32 [s], {t, t};", "misaligned"),
        ("ld.shared.u32 v, [s+2];", "misaligned"),
        ("atom.shared.add.u32 v, [s], 1;", "never written"),
    ]
    for body, kind in cases:
        with pytest.raises(PtxError, match=kind) as e:
            launch_ptx(simple(address + "\n" + body), "victim", 1, 64, [torch.zeros(64), torch.zeros(64)])
        assert e.value.text.rstrip(";") in body
    with pytest.raises(PtxError, match="never written") as e:
        launch_ptx(simple(address + "\n" + cases[1][0]), "victim", 1, 64, [torch.zeros(64), torch.zeros(64)])
    assert e.value.thread == (5, 0, 0)
    assert e.value.address == 20


def test_misaligned_vector_load():
    with pytest.raises(PtxError, match="misaligned") as e:
        launch_ptx(
            simple("ld.global.v4.f32 {w0, w1, w2, w3}, [x];"),
            "victim",
            1,
            32,
            [torch.zeros(64), torch.zeros(64)],
        )
    assert e.value.thread == (1, 0, 0)
    assert "16" in e.value.detail
    with pytest.raises(PtxError, match="misaligned"):
        launch_ptx(
            simple("ld.global.v4.f32 {w0, w1, w2, w3}, [a];"),
            "victim",
            1,
            32,
            [torch.zeros(65)[1:], torch.zeros(64)],
        )


def test_bad_cp_async():
    z = torch.zeros(65)
    head = "mov.u32 s, sh; mad.lo.u32 s, t, 4, s;\n"
    for body, kind in (
        ("cp.async.ca.shared.global [s], [x], 4, 8;", "src-size"),
        ("cp.async.ca.shared.global [s], [x], 8;", "misaligned"),
        ("mov.u32 s, sh; mad.lo.u32 s, t, 16, s;\ncp.async.cg.shared.global [s], [x], 16;", "misaligned"),
        ("cp.async.ca.shared.global [s+4], [x], 4;", "out of bounds"),
        ("cp.async.ca.shared.global [s], [x+8], 4;", "out of bounds"),
        ("cp.async.ca.shared.global [s], [x], 12;", "bad size"),
        ("cp.async.cg.shared.global [s], [x], 8;", "bad size"),
    ):
        with pytest.raises(PtxError, match=kind):
            launch_ptx(
                simple(head + body, shared=256 if "16" in body else 64), "victim", 1, 64, [z, z.clone()]
            )


def test_shuffle_with_a_mask_that_leaves_out_the_caller():
    with pytest.raises(PtxError, match="membermask") as e:
        launch_ptx(
            simple("shfl.sync.bfly.b32 v, t, 1, 31, 0x7fffffff;"),
            "victim",
            1,
            32,
            [torch.zeros(64), torch.zeros(64)],
        )
    assert e.value.thread == (31, 0, 0)


def test_shuffle_that_a_lane_never_reaches():
    for options in ({}, {"schedule": "random"}):
        with pytest.raises(PtxError, match="deadlock"):
            launch_ptx(
                simple(
                    "setp.eq.u32 p, t, 7;\n@p bra L;\nshfl.sync.bfly.b32 v, t, 1, 31, -1;\nbar.sync 1;\nL:\nbar.sync 2;"
                ),
                "victim",
                1,
                64,
                [torch.zeros(64), torch.zeros(64)],
                **options,
            )


def test_bad_launches():
    z = torch.zeros(64)
    with pytest.raises(PtxError, match="bad launch"):
        launch_ptx(simple("mov.u32 v, 0;"), "victim", 1, 2048, [z, z])
    with pytest.raises(PtxError, match="bad launch"):
        launch_ptx(simple("mov.u32 v, 0;"), "victim", 1, 32, [z, z], 170 * 1024)
    with pytest.raises(PtxError, match="wrong number of arguments"):
        launch_ptx(simple("mov.u32 v, 0;"), "victim", 1, 32, [z])
    with pytest.raises(PtxError, match="no such kernel"):
        launch_ptx(simple("mov.u32 v, 0;"), "other", 1, 32, [z, z])
