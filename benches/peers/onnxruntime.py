"""ONNX Runtime on the CPU: models of one or two operators, with bound inputs and results."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from benches.case import Contender, Refused
from benches.jagged import CONTIGUOUS, PADDED, Batch, Layout, padding_mask
from benches.peers import need, need_device

PINNING = ("OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES")


def attention(batch: Batch) -> Contender:
    """`MultiHeadAttention`, whose input is `[B, n, H·D]`, dense or padded with a key padding mask."""
    if batch.train:
        raise Refused("ONNX Runtime does not train here")
    if batch.causal or batch.grouped:
        raise Refused("not set up for causal or grouped attention")
    heads = batch.query.shape[1]
    layout = _merged(CONTIGUOUS if batch.dense else PADDED, heads)
    inputs = {
        "query": layout.to(batch.query, batch.candidates),
        "key": layout.to(batch.key, batch.events),
        "value": layout.to(batch.value, batch.events),
    }
    names = list(inputs)
    mask = padding_mask(batch.events, batch.device)
    if mask is not None:
        inputs["mask"] = mask.int()
        names += ["", "mask"]  # the fourth input is a bias
    node = ("MultiHeadAttention", names, ["out"], {"num_heads": heads, "domain": "com.microsoft"})
    run = session([node], inputs, {"out": inputs["query"].new_empty(inputs["query"].shape)})
    note = "" if batch.dense else "padding not timed"
    return Contender(run, lambda outs: [layout.back(outs[0], batch.candidates)], own_threads=True, note=note)


def topk(problem: Any) -> Contender:
    """`MatMul` and `TopK` over the whole catalogue, its transpose stored."""
    nodes = [
        ("MatMul", ["users", "items"], ["logits"], {}),
        ("TopK", ["logits", "k"], ["scores", "ids"], {"axis": -1}),
    ]
    rows = problem.users.shape[0]
    results = {
        "scores": problem.users.new_empty(rows, problem.k),
        "ids": torch.empty(rows, problem.k, dtype=torch.int64),
    }
    inputs = {
        "users": problem.users,
        "items": problem.catalog.T.contiguous(),
        "k": torch.tensor([problem.k]),
    }
    run = session(nodes, inputs, results)
    return Contender(run, lambda outs: list(outs), own_threads=True)


def _merged(layout: Layout, heads: int) -> Layout:
    """Of `[B, H, n, D]`, `[B, n, H·D]`."""
    return Layout(
        lambda rows, counts: layout.to(rows, counts).transpose(1, 2).flatten(2).contiguous(),
        lambda out, counts: layout.back(out.unflatten(2, (heads, -1)).transpose(1, 2), counts),
    )


def session(
    nodes: list[tuple[str, list[str], list[str], dict[str, Any]]],
    inputs: dict[str, Tensor],
    results: dict[str, Tensor],
):
    """The graph as a function without arguments that writes `results` and returns them."""
    for tensor in inputs.values():
        need_device(tensor.device, "cpu")
        if tensor.dtype == torch.bfloat16:
            raise Refused("its CPU kernels take no bfloat16")
    pinned = [name for name in PINNING if name in os.environ]
    if pinned:
        raise Refused(f"its threads would inherit the pinning by {pinned[0]}")
    ort, onnx = need("onnxruntime"), need("onnx")
    kinds = {
        torch.float32: onnx.TensorProto.FLOAT,
        torch.float16: onnx.TensorProto.FLOAT16,
        torch.int32: onnx.TensorProto.INT32,
        torch.int64: onnx.TensorProto.INT64,
    }

    def describe(tensors: dict[str, Tensor]) -> list[Any]:
        make = onnx.helper.make_tensor_value_info
        return [make(name, kinds[x.dtype], list(x.shape)) for name, x in tensors.items()]

    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(kind, ins, outs, **extra) for kind, ins, outs, extra in nodes],
        "case",
        describe(inputs),
        describe(results),
    )
    versions = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=versions, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its pool would otherwise spin between calls, on the cores of the next contender.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    engine = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = engine.io_binding()
    numpy_kinds = {name: x.numpy().dtype for name, x in {**inputs, **results}.items()}
    for name, x in inputs.items():
        binding.bind_input(name, "cpu", 0, numpy_kinds[name], list(x.shape), x.data_ptr())
    for name, x in results.items():
        binding.bind_output(name, "cpu", 0, numpy_kinds[name], list(x.shape), x.data_ptr())

    def run() -> list[Tensor]:
        assert inputs  # bound by address: they must live as long as the session
        engine.run_with_iobinding(binding)
        return list(results.values())

    return run
