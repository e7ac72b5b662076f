"""Running one or a few instructions: a kernel that loads operands, executes a body, stores results."""

import numpy as np
from ptxemu import launch_ptx
from ptxemu.parser import TYPE_BYTES

# The register that holds a type: none is of 8 bits.
REG = {name: f"b{max(16, 8 * size)}" for name, size in TYPE_BYTES.items()}


def run_body(body, inputs, outputs, n=None, extra="", **options):
    """body uses registers i0, i1, ... (inputs), o0, o1, ... (outputs), predicates p, q and t0..t7 (b32).
    inputs: [(ptx type, array)], outputs: [(ptx type, dtype)]. One thread per element, one block."""
    n = n or max(len(a) for _, a in inputs)
    arrays = [np.ascontiguousarray(np.resize(a, n)) for _, a in inputs]
    results = [np.zeros(n, dt) for _, dt in outputs]
    decl, loads, stores, params = [], [], [], []
    for k, (t, a) in enumerate(
        [(t, a) for (t, _), a in zip(inputs, arrays, strict=True)]
        + [(t, r) for (t, _), r in zip(outputs, results, strict=True)]
    ):
        is_in = k < len(inputs)
        name = f"i{k}" if is_in else f"o{k - len(inputs)}"
        mem = f"b{8 * a.itemsize}"
        params.append(f".param .u64 P{k}")
        decl.append(f".reg .{REG[t]} {name};")
        address = f"ld.param.u64 a, [P{k}]; mad.wide.u32 a, tid, {a.itemsize}, a;"
        if is_in:
            loads.append(f"{address} ld.global.{mem} {name}, [a];")
        else:
            loads.append(f"ld.param.u64 a{k}, [P{k}]; mad.wide.u32 a{k}, tid, {a.itemsize}, a{k};")
            decl.append(f".reg .b64 a{k};")
            stores.append(f"st.global.{mem} [a{k}], {name};")
    ptx = f"""
.version 8.0
.target sm_80
.address_size 64
{extra}
.visible .entry k({", ".join(params)})
{{
  .reg .pred p, q; .reg .b32 t<8>; .reg .b64 a; .reg .u32 tid;
  {" ".join(decl)}
  mov.u32 tid, %tid.x;
  {" ".join(loads)}
  {body}
  {" ".join(stores)}
  ret;
}}"""
    launch_ptx(ptx, "k", 1, n, arrays + results, **options)
    return results if len(results) > 1 else results[0]


def bf16(x):
    """float array -> bf16 bits by round to nearest even (independent of the emulator)."""
    import torch

    with np.errstate(all="ignore"):
        x = np.asarray(x, np.float32)
    return torch.tensor(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def bf16_value(bits):
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)
