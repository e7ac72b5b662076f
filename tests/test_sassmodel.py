"""The performance model: decoding, loops, rates, occupancy, and simulations with known answers. Needs
nvdisasm (Triton's package has one) and, for code in CUDA, nvcc; no GPU."""

import re
import shutil
import subprocess
from itertools import pairwise

import pytest

from benches.sassmodel import CHIPS, analyse, load, notes, occupancy, report
from benches.sassmodel.chips import mma_flops, uses
from benches.sassmodel.model import hot_loop, life, tensor_loops
from benches.sassmodel.paths import plain
from benches.sassmodel.sass import Instr, decode, parse
from benches.sassmodel.simulate import simulate

nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")

CHAIN = """
extern "C" __global__ void chain(float *p, float a, float b) {
    float x = p[threadIdx.x];
    #pragma unroll
    for (int i = 0; i < 8; i++) x = x * a + b;
    p[threadIdx.x] = x;
}"""
MANY = """
extern "C" __global__ void many(float *p, int n) {
    __shared__ float s[1024];
    float x = p[threadIdx.x];
    for (int i = 0; i < n; i++) {
        s[threadIdx.x] = x;
        __syncthreads();
        asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
        x += s[threadIdx.x ^ 7] + __shfl_xor_sync(~0u, x, 4);
        __syncthreads();
    }
    p[threadIdx.x] = x;
}"""
MMA = """
extern "C" __global__ void mma(float *p, unsigned a, int n) {
    float c[8][4] = {};
    for (int i = 0; i < n; i++)
        #pragma unroll
        for (int j = 0; j < 8; j++)
            asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                "{%0,%1,%2,%3}, {%4,%4,%4,%4}, {%4,%4}, {%0,%1,%2,%3};"
                : "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3]) : "r"(a + i));
    for (int j = 0; j < 8; j++) p[threadIdx.x + j * 32] = c[j][0] + c[j][1] + c[j][2] + c[j][3];
}"""


def build(tmp_path, source, sm, threads=128):
    file, out = tmp_path / "k.cu", tmp_path / f"k{sm}.cubin"
    file.write_text(source)
    subprocess.run(["nvcc", "-cubin", "-O3", f"-arch=sm_{sm}", "-o", out, file], check=True)
    return load(out, threads)


def instruction(name, stall=1, wbar=7, wait=0, args="", pred="", addr=0, target=-1):
    op, *mods = name.split(".")
    return Instr(addr, pred, op, tuple(mods), args, stall, wbar, 7, wait, target)


def test_control_word_fields():
    """Encodings as nvdisasm printed them: a dependent FFMA, a load that sets scoreboard 2, its consumer."""
    i = decode(Instr(0, "", "FFMA", (), ""), 0x000FC80000000005)
    assert (i.stall, i.wbar, i.rbar, i.wait) == (4, 7, 7, 0)
    i = decode(Instr(0, "", "LDG", ("E",), ""), 0x000EA2000C1E1900)
    assert (i.stall, i.wbar, i.rbar, i.wait) == (1, 2, 7, 0)
    assert decode(Instr(0, "", "FFMA", (), ""), 0x004FC80000000005).wait == 1 << 2


@nvcc
@pytest.mark.parametrize("sm", [80, 90])
def test_a_dependent_chain_stalls_four(tmp_path, sm):
    code = build(tmp_path, CHAIN, sm).code
    ffma = [i for i in code if i.op == "FFMA"]
    assert len(ffma) == 8
    assert {i.stall for i in ffma[:-1]} == {4}
    loaded = next(i for i in code if i.op == "LDG")
    assert loaded.wbar != 7
    assert ffma[0].wait >> loaded.wbar & 1  # its consumer waits for it
    assert not any(i.wait for i in ffma[1:])


@nvcc
@pytest.mark.parametrize("sm", [80, 90, 100])
def test_every_result_of_variable_latency_is_waited_for(tmp_path, sm):
    """Every scoreboard that a load, shuffle or MUFU sets is in the wait mask of its first reader."""
    code = build(tmp_path, MANY, sm).code
    checked = 0
    for n, i in enumerate(code):
        if i.op in ("LDS", "SHFL", "MUFU", "LDG", "S2R") and i.wbar != 7:
            dest = re.search(r"\bR\d+\b", i.args)[0]
            for j in code[n + 1 :]:
                if j.wait >> i.wbar & 1:
                    checked += 1
                    break
                assert not re.search(rf"\b{dest}\b", j.args.split(",", 1)[-1]), (i, j)
    assert checked >= 4


@nvcc
def test_the_loop_and_the_block_s_life(tmp_path):
    k = build(tmp_path, MANY, 80)
    assert k.smem == 4096
    loop = hot_loop(k)
    assert [i.op for i in loop.path].count("MUFU") in (1, 2, 4)  # unrolled or not
    assert sum(i.op == "BAR" for i in loop.path) == 2 * sum(i.op == "MUFU" for i in loop.path)
    twice, thrice = (sum(i.op == "MUFU" for i in life(k, loop, trips)) for trips in (2, 3))
    assert thrice - twice == sum(i.op == "MUFU" for i in loop.path)
    assert life(k, loop, 2)[-1].op == "EXIT"


@nvcc
@pytest.mark.parametrize(("sm", "cycles"), [(80, 8), (90, 6)])
def test_the_rate_of_mma_is_what_ptxas_schedules(tmp_path, sm, cycles):
    k = build(tmp_path, MMA, sm)
    path = hot_loop(k).path
    hmma = [i for i in path if i.op == "HMMA"]
    assert mma_flops(hmma[0]) == (2 * 16 * 8 * 16, 2)
    assert uses(hmma[0], CHIPS["a100" if sm == 80 else "h100"])["tensor"] == pytest.approx(cycles, rel=0.01)
    assert min(a.stall for a, b in pairwise(path) if a.op == b.op == "HMMA") == cycles
    a = analyse(k)
    assert a.bound_pipe == "tensor"
    assert a.flops == 4096 * len(hmma)
    # mma.sync alone reaches the peak on an A100, and two thirds of it on an H100.
    low, high = (0.9, 1.01) if sm == 80 else (0.6, 0.68)
    assert low < a.share_of_peak < high
    assert "tensor" in report(a)
    assert notes(a) == []


def test_the_shapes_of_tensor_instructions():
    def flops(name):
        return mma_flops(instruction(name))

    assert flops("HGMMA.64x128x16.F32.BF16") == (2 * 64 * 128 * 16 // 4, 2)
    assert flops("QGMMA.64x64x32.F32.E4M3.E4M3") == (2 * 64 * 64 * 32 // 4, 1)
    assert flops("IMMA.16832.S8.S8") == (2 * 16 * 8 * 32, 1)
    assert flops("HMMA.1688.F32.TF32") == (2 * 16 * 8 * 8, 4)
    assert flops("FFMA.FTZ") == (0, 0)
    h = instruction("HGMMA.64x128x16.F32.BF16", args="R24, gdesc[UR8], R24")
    assert uses(h, CHIPS["h100"])["tensor"] == 64  # 128 columns at N / 2 cycles


def test_peaks():
    assert CHIPS["a100"].peak_tflops == pytest.approx(312, rel=0.01)
    assert CHIPS["h100"].peak_tflops == pytest.approx(989, rel=0.01)
    assert CHIPS["b200"].peak_tflops == pytest.approx(2250, rel=0.01)


@pytest.mark.parametrize(
    ("chip", "threads", "regs", "smem", "blocks"),
    [
        ("a100", 128, 255, 48 << 10, 2),  # registers: 8 warps of 255 an SM
        ("a100", 128, 128, 0, 4),
        ("a100", 256, 64, 0, 4),
        ("a100", 1024, 32, 0, 2),
        ("a100", 32, 16, 0, 32),
        ("a100", 128, 32, 40 << 10, 4),  # 4 x 41 KB = 164 KB
        ("a100", 128, 32, 164 << 10, 0),  # a block may have 163 KB
        ("h100", 384, 168, 200 << 10, 1),
        ("h100", 128, 32, 56 << 10, 4),
    ],
)
def test_occupancy(chip, threads, regs, smem, blocks):
    assert occupancy(CHIPS[chip], threads, regs, smem).blocks == blocks


def test_simulations_with_known_answers():
    chip = CHIPS["a100"]
    chain = [instruction("FFMA", 4)] * 8
    assert simulate(chain, chip, 1).cycles == 32  # latency
    assert simulate(chain, chip, 2).cycles == 32  # hidden by a second warp
    assert simulate(chain, chip, 4).cycles == pytest.approx(64, rel=0.05)  # 2 cycles each: the pipe
    mufu = [instruction("MUFU.EX2", 1, 0), instruction("FADD", 4, 7, 1)]
    assert simulate(mufu, chip, 1).cycles == pytest.approx(18 + 4, abs=3)
    assert simulate(mufu, chip, 8, 8).cycles == pytest.approx(64, rel=0.05)  # 8 warps x 8 cycles
    both = [instruction("FFMA"), instruction("FMNMX")] * 8
    assert simulate(both, chip, 4).cycles == pytest.approx(64, rel=0.1)  # two pipes, one issue a clock


def test_a_barrier_holds_the_block_and_not_its_neighbour():
    chip = CHIPS["a100"]
    path = [instruction("BAR.SYNC"), *[instruction("FFMA", 4)] * 4]
    together, apart = (simulate(path, chip, 4, blocks).waits["barrier"] for blocks in (1, 4))
    assert apart < together


TEXT = """\t.target\tsm_80
//--------------------- .text.k  --------------------------
\t.sectioninfo\t@"SHI_REGISTERS=24"
.text.k:
.L_x_0:
        /*0000*/                   FFMA R0, R0, R5, R3 ;   /* 0x00005b0000007623 */
                                                           /* 0x000fc80000000005 */
        /*0010*/              @!P0 BRA `(.L_x_0) ;         /* 0xfffffff0006c8947 */
                                                           /* 0x000fea000383ffff */
        /*0020*/                   EXIT ;                  /* 0x000000000000794d */
                                                           /* 0x000fea0003800000 */
"""


def test_parse_without_tools():
    (k,) = parse(TEXT)
    assert k.regs == 24
    assert [x.name for x in k.code] == ["FFMA", "BRA", "EXIT"]
    assert k.code[1].target == 0
    assert [x.op for x in hot_loop(k).path] == ["FFMA", "BRA"]


def looping(*names_and_targets):
    """A kernel from (name, predicate, target index)."""
    (k,) = parse(TEXT)
    k.code = [
        instruction(name, pred=pred, addr=16 * n, target=-1 if target is None else 16 * target)
        for n, (name, pred, target) in enumerate(names_and_targets)
    ]
    return k


def test_of_two_loops_with_equal_work_the_shorter_is_hot():
    """A loop and its masked twin behind it."""
    k = looping(
        ("HMMA.16816.F32", "", None), ("BRA", "@P0", 0),
        ("FSEL", "", None), ("HMMA.16816.F32", "", None), ("BRA", "@P0", 2),
        ("EXIT", "", None),
    )  # fmt: skip
    assert len(tensor_loops(k)) == 2
    assert hot_loop(k).header == 0
    assert [i.op for i in life(k, hot_loop(k), 2)].count("HMMA") == 3  # twice, and the masked one once


def test_the_plain_path_has_all_products_and_copies_and_nothing_else():
    """An option that skips a block, two ways to load a tile, and a loop of copies inside."""
    k = looping(
        ("BAR", "", None), ("BRA", "@P0", 5),
        ("LDGSTS.E.128", "", None), ("BRA", "@P1", 2), ("BRA", "", 6),
        ("LDG", "", None),
        ("HMMA.16816.F32", "", None), ("BRA", "@P2", 9), ("FMUL", "", None),
        ("BRA", "@P3", 0), ("EXIT", "", None),
    )  # fmt: skip
    path = [i.op for i in plain(k, hot_loop(k), copies=3).path]
    assert path == ["BAR", "BRA", *["LDGSTS", "BRA"] * 3, "BRA", "HMMA", "BRA", "BRA"]
    k = looping(
        ("LDGSTS.E.128", "", None), ("HMMA.16816.F32", "", None), ("BRA", "@P0", 0), ("EXIT", "", None)
    )
    with pytest.raises(ValueError, match="no loop that makes them"):
        plain(k, hot_loop(k), copies=2)


def test_a_second_run_for_rare_input_is_not_part_of_a_block_s_life():
    """Behind the loop a branch over two loops: they are what runs again where a NaN was found."""
    loop = [("HMMA.16816.F32", "", None), ("BRA", "@P0", None)]
    k = looping(
        ("HMMA.16816.F32", "", None), ("BRA", "@P0", 0),
        ("BRA", "@P1", 7),
        (*loop[0][:2], None), ("BRA", "@P0", 3),
        (*loop[0][:2], None), ("BRA", "@P0", 5),
        ("STG", "", None), ("EXIT", "", None),
    )  # fmt: skip
    ops = [i.op for i in life(k, hot_loop(k), 4)]
    assert ops.count("HMMA") == 4
    assert ops[-2:] == ["STG", "EXIT"]


def test_a_merge_of_several_chunks_is_not_part_of_a_block_s_life():
    """It is the loop with exponentials and no products; another loop behind a branch, and a tile's, are."""

    def counts(inside):
        k = looping(
            ("HMMA.16816.F32", "", None), ("BRA", "@P0", 0),
            ("BRA", "@P1", 6),
            ("BAR", "", None), (inside, "", None), ("BRA", "@P0", 4),
            ("STG", "", None), ("EXIT", "", None),
        )  # fmt: skip
        ops = [i.op for i in life(k, hot_loop(k), 2)]
        return ops.count("BAR"), ops.count("STG")

    assert counts("MUFU.EX2") == (0, 1)
    assert counts("ATOMS") == (1, 1)
    assert counts("HMMA.16816.F32") == (1, 1)


def test_a_triton_kernel_ahead_of_time():
    """The counts of attention's loop: products by their shapes, one exponential for a score."""
    pytest.importorskip("triton")
    from benches import model

    if model.aot.triton.knobs.runtime.interpret:
        pytest.skip("Triton interprets in this process, and compiles nothing")
    case = model.plain_case("target_attention", "bfloat16", 64)
    for arch, instruction in ((80, "mma.sync"), (90, "wgmma.mma_async")):
        launched = model.aot.launches(arch, "target_attention", case)[0]
        a = model.analysis_of(launched)
        options = model.constants(launched)
        scores = options["BLOCK_M"] * options["BLOCK_N"] // launched.metadata.num_warps  # of a warp
        assert a.flops == 4 * scores * 64
        assert scores / 32 <= sum(n for name, n in a.top.items() if name == "MUFU.EX2") <= 1.2 * scores / 32
        assert model.aot.describe(launched, arch, "target_attention", case)["matrix"] == [instruction]
        assert a.bound <= a.cycles <= a.alone.cycles
        assert a.block_cycles(8) > a.block_cycles(2)

        # As one of two blocks that share the values of a tile, and both do its scores: 2 + 2 * 1/2 of 2 + 2
        # products, twice.
        tile = model.Launch(options["BLOCK_M"], options["BLOCK_N"], 4, 2)
        work = model.WORK["target_attention._forward"]
        alone, shared = (
            model.modelled(a, "", "bfloat16", 64, w, tile)
            for w in (work, model.replace(work, flops=3, parts=2))
        )
        for name in ("loop", "bound", "instructions"):
            assert getattr(shared, name) == pytest.approx(1.5 * getattr(alone, name))
        # Whole tiles of 64 x 32 scores, were they those of half a product: 4/3 as many events an iteration.
        assert shared.shape_cost(64, 1 << 20) == pytest.approx(1.5 * alone.shape_cost(64, 1 << 20), rel=1e-3)


def test_short_histories_have_kernels_of_their_own():
    """Each shape is the cost of the kernel that serves it."""
    pytest.importorskip("triton")
    from benches import model

    if model.aot.triton.knobs.runtime.interpret:
        pytest.skip("Triton interprets in this process, and compiles nothing")
    found = model.ours((80, "target_attention", "bfloat16", 32))
    served = {m.launch[0]: list(m.costs) for m in found if m.kernel.endswith(model.ONE_CHUNK)}
    assert served == {32: ["20 x 50", "1 x 1024"], 128: ["256 x 50", "256 x 200", "256 x 1024"]}
    assert [list(m.costs) for m in found if not m.kernel.endswith(model.ONE_CHUNK)] == [list(model.SHAPES)]
