"""Chips: sizes, rates and latencies, each with its source, and what an instruction occupies.

A rate is the number of cycles for which one warp instruction occupies a pipe of its SM
sub-partition. An SM has four of them. A pipe that the whole SM shares (shared memory, L2) is
charged four times, as if all four sub-partitions ran the same code in step.

Sources of the numbers:
  [guide]  CUDA C++ programming guide, table of arithmetic throughput per SM and compute capability
  [white]  NVIDIA's A100, H100 and Blackwell architecture papers and data sheets
  [ncu]    the pipeline list in the Nsight Compute guide and NVIDIA staff's posts about it
           (GA100: tensor, FP16 and FP64 behind one dispatch port; GH100: FMA heavy + FMA lite)
  [ptxas]  the stall counts that ptxas puts between adjacent instructions of one pipe, the
           compiler's own idea of the rate
  [bench]  published microbenchmarks (Sun et al. 2022 on mma; Luo et al. 2024, 2025 on Hopper)
  [guess]  an assumption of this model
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from .sass import Instr


@dataclass(frozen=True)
class Chip:
    name: str
    sm: int
    sms: int  # [white]
    mhz: float  # [white] the clock at which the data sheet's peak holds
    peak: int  # [white] dense bf16 tensor FLOP per clock and SM
    mma: int  # FLOP per clock and sub-partition of mma.sync in bf16
    smem: int  # [white] shared memory per SM in bytes
    smem_block: int  # [guide] the most a block may have
    l2: float  # bytes per clock and SM out of L2
    cost: dict = field(default_factory=dict)

    @property
    def peak_tflops(self):
        return self.peak * self.sms * self.mhz / 1e6


SM80 = {
    "fma": 2,  # [guide] 64 results per clock and SM, [ptxas] 2
    "heavy": 2,  # IMAD: same pipe
    "alu": 2,  # [guide] 64, [ptxas] 2: FMNMX, IADD3, LOP3, SEL, PRMT, MOV, F2FP
    "xu": 8,  # [guide] 16 per clock and SM, [ptxas] 8: MUFU; I2F and F2I likewise
    "half": 1,  # [guide] fp16 256 results per clock and SM
    "bhalf": 2,  # [guide] bf16 128
    "fp64": 4,  # [guide] 32
    "uniform": 2,  # [ptxas] UMOV, USHF
}
SM90 = SM80 | {
    "fma": 1,  # [guide] 128, [ptxas] 1: FMA heavy and lite together; [ncu] IMAD runs on the heavy half only
    "bhalf": 1,  # [guide] 256
    "fp64": 2,  # [guide] 64
    "uniform": 1,  # [ptxas] UMOV
}

CHIPS = {
    # 312 TFLOP/s. mma.sync reaches the peak: 4096 FLOP in 8 cycles, [white] and [ptxas] agree.
    # L2: 5120 bytes per clock over the chip [white], divided by 108.
    "a100": Chip("A100 SXM", 80, 108, 1410, 2048, 512, 164 << 10, 163 << 10, 47.0, SM80),
    # 989 TFLOP/s with wgmma. mma.sync m16n8k16 takes 6 cycles [ptxas], two thirds of the peak;
    # [bench] measured 62 to 65 %. L2: [guess], A100's 64 bytes per clock and 512 KB slice carried
    # over; [bench] measured about 5.5 to 7 TB/s, 23 to 29 bytes per clock and SM.
    "h100": Chip("H100 SXM", 90, 132, 1830, 4096, 683, 228 << 10, 227 << 10, 48.0, SM90),
    # 2250 TFLOP/s dense with tcgen05, whose shapes are not in the instruction: counts only.
    # mma.sync: [guess], as on Hopper.
    "b200": Chip("B200", 100, 148, 1850, 8192, 683, 228 << 10, 227 << 10, 48.0, SM90),
}
DEFAULT = {80: "a100", 90: "h100", 100: "b200"}

# Cycles from the start in the pipe to the scoreboard's release. Nominal, unloaded, from [bench] and
# common measurements; global memory as an L2 hit [guess], since attention re-reads K and V from L2.
LATENCY = {
    "xu": 18,
    "smem": 26,
    "ldsm": 30,
    "shfl": 24,
    "const": 30,
    "l2": 280,
    "sreg": 20,
    "tensor": 18,
    "other": 14,
}
READ_DELAY = 10  # [guess] operands are read this long after the start
BARRIER = 20  # [guess] from the last arrival to the first issue
QUEUE = {"xu": 4, "smem": 6, "l2": 64, "tensor_async": 64}  # [guess] instructions waiting before issue stops

# Opcodes by what they occupy.
_OPCODES = {
    "ALU": """
        IADD3 IADD IADD32I LOP3 LOP LOP32I SHF SHL SHR LEA ISETP FSETP FMNMX FMNMX3 SEL FSEL PRMT
        MOV MOV32I PLOP3 P2R R2P IABS IMNMX VIMNMX VIMNMX3 VIADD VIADDMNMX VABSDIFF VABSDIFF4 BMSK
        SGXT F2FP CS2R FCHK VOTE IMNMX3 I2FP F2IP VOTEU R2UR FSWZ REDUX
    """,
    "FMA": """
        FFMA FADD FMUL FFMA32I FADD32I FMUL32I FSWZADD FFMA2 FADD2 FMUL2
    """,
    "HEAVY": """
        IMAD IMUL IMUL32I IMAD32I XMAD IDP IDP4A
    """,
    "XU": """
        MUFU F2F F2I I2F FRND POPC FLO BREV I2I
    """,
    "HALF": """
        HADD2 HMUL2 HFMA2 HSETP2 HSET2 HMNMX2 HADD2_32I HFMA2_32I HMUL2_32I
    """,
    "SHARED": """
        LDS STS LDSM STSM ATOMS SHFL LDL STL MATCH
    """,
    "GLOBAL": """
        LDG STG LD ST LDGSTS ATOM ATOMG RED REDG UTMALDG UTMASTG UBLKCP
    """,
    "SYNC": """
        BAR DEPBAR LDGDEPBAR MEMBAR FENCE SYNCS ARRIVES WARPGROUP WARPSYNC ERRBAR CCTL B2R NANOSLEEP
        YIELD UTCBAR ELECT PREEXIT ACQBULK USETMAXREG
    """,
    "BRANCH": """
        BRA BRX JMP EXIT RET CALL BSSY BSYNC BREAK BPT KILL NOP
    """,
}
ALU, FMA, HEAVY, XU, HALF, SHARED, GLOBAL, SYNC, BRANCH = (
    frozenset(text.split()) for text in _OPCODES.values()
)


def width(i: Instr) -> int:
    """Bytes per thread of a load or store."""
    return next(
        (int(m) // 8 for m in i.mods if m in ("64", "128", "256")),
        1 if {"U8", "S8"} & set(i.mods) else 2 if {"U16", "S16"} & set(i.mods) else 4,
    )


def mma_flops(i: Instr) -> tuple[int, int]:
    """(FLOP of one warp, bytes per element) of a tensor instruction; (0, 0) when not one."""
    for m in i.mods:
        if i.op in ("HGMMA", "IGMMA", "QGMMA", "BGMMA") and (s := re.fullmatch(r"(\d+)x(\d+)x(\d+)", m)):
            m_, n, k = map(int, s.groups())  # of the warpgroup: a quarter each
            flops = 2 * m_ * n * k // 4
            return flops * (2 if "SP" in i.mods else 1), {"HGMMA": 4 if "TF32" in i.mods else 2}.get(i.op, 1)
        if i.op in ("HMMA", "IMMA", "QMMA", "DMMA", "BMMA", "OMMA") and (
            s := re.fullmatch(r"(16|8)(8|16)(\d+)", m)
        ):
            m_, n, k = map(int, s.groups())
            size = {"IMMA": 1, "QMMA": 1, "DMMA": 8}.get(i.op, 4 if "TF32" in i.mods else 2)
            return 2 * m_ * n * k * (2 if "SP" in i.mods else 1), size
    return 0, 0


def uses(i: Instr, chip: Chip) -> dict[str, float]:
    """{pipe: cycles} for one warp instruction on one sub-partition, besides its issue slot."""
    c, op = chip.cost, i.op
    if i.never:
        return {}
    flops, size = mma_flops(i)
    if op.endswith("GMMA"):
        rate = chip.peak / 4 * 2 / size
        n, k = (int(x) for x in next(m for m in i.mods if "x" in m).split("x")[1:])
        regs_a = re.match(r"R\w+, R\d+", i.args)
        # [guess] B, and A unless it is in registers, cross the 128-byte shared memory port once
        return {"tensor": flops / rate, "smem": (n * k * size + (0 if regs_a else 64 * k * size)) / 128}
    if flops:
        return {"tensor": flops / (chip.mma * 2 / size)}
    if op.startswith("UTC"):
        return {"tensor": 0}
    if op in HEAVY:
        n = 2 if {"WIDE", "HI"} & set(i.mods) else 1  # [ptxas] 4 cycles
        return {"fma": c["fma"] * n, "heavy": c["heavy"] * n}
    if op in FMA:
        n = 2 if op.endswith("2") else 1
        return {"fma": c["fma"] * n}
    if op in HALF:
        if chip.sm >= 90:
            return {"fma": c["bhalf"]}
        return {"half": c["bhalf" if any("BF16" in m for m in i.mods) else "half"]}
    if op in XU:
        return {"xu": c["xu"]}
    if op in ("DFMA", "DADD", "DMUL", "DSETP"):
        return {"fp64": c["fp64"]}
    if op in ("SHFL", "MATCH", "ATOMS"):
        return {"smem": 4}  # [guide] 32 lanes per clock and SM
    if op in ("LDSM", "STSM"):
        return {"smem": 4 * int(next((m for m in reversed(i.mods) if m in "124"), 1))}
    if op in SHARED:
        return {"smem": 4 * max(1, width(i) / 4)}  # [white] 128 bytes per clock and SM
    if op in GLOBAL:
        size = 32 * width(i)  # TMA: its bytes are not in the instruction
        return {"l2": 4 * size / chip.l2, "smem": 4 * max(1, size / 128)} if op[:2] != "UT" else {"l2": 0}
    if op in ALU:
        return {"alu": 1 if op == "CS2R" else c["alu"]}  # [ptxas]
    if op in SYNC or op in BRANCH:
        return {"branch": 1}
    if op in ("S2R", "S2UR", "LDC", "LDCU", "ULDC", "GETLMEMBASE", "UFLO"):
        return {"const": 2}
    if op.startswith("U"):
        return {"uniform": c["uniform"]}
    return {"unknown": 2}


def latency(i: Instr) -> tuple[int, int]:
    """(cycles to the result, cycles to the operand read) for a scoreboard."""
    op = i.op
    if op in GLOBAL:
        return LATENCY["l2"], READ_DELAY
    kind = (
        "xu"
        if op in XU
        else "ldsm"
        if op == "LDSM"
        else "shfl"
        if op == "SHFL"
        else "smem"
        if op in SHARED
        else "sreg"
        if op in ("S2R", "S2UR", "B2R")
        else "const"
        if op in ("LDC", "LDCU", "ULDC")
        else "other"
    )
    return LATENCY[kind], READ_DELAY


@dataclass(frozen=True)
class Occupancy:
    blocks: int
    warps: int
    limit: str


def occupancy(chip: Chip, threads: int, regs: int, smem: int) -> Occupancy:
    """Resident blocks and warps of one SM, and what limits them."""
    warps = math.ceil(threads / 32)
    per_warp = math.ceil(max(regs, 1) / 8) * 8 * 32  # registers come by 256 for a warp
    by_regs = (16384 // per_warp) * 4 // warps  # 16,384 to a sub-partition
    by_smem = chip.smem // (math.ceil((smem + 1024) / 128) * 128)  # a block costs 1 KB more
    limits = {"registers": by_regs, "shared memory": by_smem, "warps": 64 // warps, "blocks": 32}
    n = min(limits.values()) if smem <= chip.smem_block else 0
    return Occupancy(n, n * warps, min(limits, key=limits.get))
