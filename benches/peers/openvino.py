"""OpenVINO on the CPU: models of one operator, compiled for latency, its threads not pinned."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benches.case import Contender, Refused
from benches.jagged import CONTIGUOUS, PADDED, Batch, padding_mask
from benches.peers import need, need_device


def attention(batch: Batch) -> Contender:
    """`scaled_dot_product_attention`, dense or padded with a boolean mask; shapes are fixed in the model."""
    if batch.train:
        raise Refused("OpenVINO does not train")
    if batch.causal or batch.grouped:
        raise Refused("not set up for causal or grouped attention")
    need_device(batch.device, "cpu")
    ov = need("openvino")
    layout = CONTIGUOUS if batch.dense else PADDED
    mask = padding_mask(batch.events, batch.device)
    inputs = [
        layout.to(batch.query, batch.candidates),
        layout.to(batch.key, batch.events),
        layout.to(batch.value, batch.events),
    ]
    inputs += [] if mask is None else [mask[:, None, None, :].contiguous()]
    parameters = [_parameter(ov, x) for x in inputs]
    result = ov.opset13.scaled_dot_product_attention(*parameters)
    run = compile_model(ov, [result], parameters, inputs)
    note = "" if batch.dense else "padding not timed"
    return Contender(run, lambda outs: [layout.back(outs[0], batch.candidates)], own_threads=True, note=note)


def topk(problem: Any) -> Contender:
    """`MatMul` and `TopK` over the whole catalogue."""
    need_device(problem.device, "cpu")
    ov = need("openvino")
    ops = ov.opset13
    users = _parameter(ov, problem.users)
    items = ov.op.Constant(_tensor(ov, problem.catalog), shared_memory=True)
    logits = ops.matmul(users, items, False, True)
    best = ops.topk(logits, problem.k, -1, "max", "value", index_element_type="i32")
    run = compile_model(ov, [best.output(0), best.output(1)], [users], [problem.users])
    return Contender(run, lambda outs: [outs[0], outs[1].long()], own_threads=True)


def _type(ov: Any, dtype: torch.dtype) -> Any:
    types = {torch.float32: ov.Type.f32, torch.bfloat16: ov.Type.bf16, torch.bool: ov.Type.boolean}
    if dtype not in types:
        raise Refused(f"not set up for {dtype}")
    return types[dtype]


def _parameter(ov: Any, x: Tensor) -> Any:
    return ov.opset13.parameter(list(x.shape), _type(ov, x.dtype))


def _tensor(ov: Any, x: Tensor) -> Any:
    """A view of torch's memory; numpy has no bfloat16."""
    if x.dtype == torch.bfloat16:
        return ov.Tensor(x.view(torch.int16).numpy(), list(x.shape), ov.Type.bf16)
    return ov.Tensor(x.numpy(), shared_memory=True)


def _to_torch(tensor: Any) -> Tensor:
    if tensor.element_type.get_type_name() == "bf16":
        return torch.from_numpy(tensor.data.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(tensor.data)


def compile_model(ov: Any, results: list[Any], parameters: list[Any], inputs: list[Tensor]):
    """The model as a function without arguments; its results are OpenVINO's own buffers, used again."""
    hint = "bf16" if inputs[0].dtype == torch.bfloat16 else "f32"
    settings = {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }
    compiled = ov.Core().compile_model(ov.Model(results, parameters), "CPU", settings)
    request = compiled.create_infer_request()
    views = [_tensor(ov, x) for x in inputs]
    for i, view in enumerate(views):
        request.set_input_tensor(i, view)

    def run() -> list[Tensor]:
        assert views  # the request knows their addresses only: they must live as long as it does
        request.infer()
        return [_to_torch(request.get_output_tensor(i)) for i in range(len(results))]

    return run
