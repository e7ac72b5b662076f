"""Small arguments of every op, plain and with all options."""

import torch
from helpers import make_jagged, make_offsets

DIFFERENTIABLE = ["target_attention", "softmax_score", "catalog_cross_entropy"]
FORWARD_ONLY = ["target_attention_weights", "target_attention_top", "catalog_topk"]

BATCH = make_jagged([2, 0, 3], [3, 2, 0], heads=4, kv_heads=2, dim=8)
FULL = make_jagged(
    [2, 0, 3], [3, 2, 4], heads=4, kv_heads=2, dim=8, options=("kv_lengths", "visible", "self", "key_bias")
)


def inputs(name, dtype=torch.float32, requires_grad=True):
    """Arguments of op `name`: plain ones, and ones with every option."""
    users, items = torch.randn(3, 8, dtype=dtype), torch.randn(5, 8, dtype=dtype)
    bias, offsets, target = torch.randn(5), make_offsets([2, 0, 3]), torch.tensor([4, -100, 0])
    calls = {
        "target_attention": [(BATCH.args, {}), (FULL.args, FULL.options | {"scale": 0.5})],
        "target_attention_weights": [(BATCH.weights_args, {}), (FULL.weights_args, FULL.weights_options)],
        "target_attention_top": [
            ((*BATCH.weights_args, 2), {}),
            ((*FULL.weights_args, 9), FULL.weights_options),
        ],
        "softmax_score": [((users, items, offsets), {}), ((users, items, offsets), {"bias": bias})],
        "catalog_topk": [
            ((users, items, 2), {}),
            (
                (users, items, 5),
                {"exclude_ids": target[[0, 2]], "exclude_offsets": make_offsets([0, 2, 0]), "bias": bias},
            ),
        ],
        "catalog_cross_entropy": [
            ((users, items, target), {}),
            (
                (users, items, target),
                {"bias": bias, "logq": bias.neg(), "label_smoothing": 0.1, "temperature": 0.5},
            ),
            ((users, items, target), {"negatives": target, "in_batch": True, "bias": bias}),
        ],
    }[name]

    def leaf(key, x):
        differentiable = isinstance(x, torch.Tensor) and x.is_floating_point() and key != "logq"
        return x.detach().clone().requires_grad_() if differentiable and requires_grad else x

    return [
        (tuple(leaf(None, x) for x in args), {key: leaf(key, x) for key, x in kwargs.items()})
        for args, kwargs in calls
    ]


def first(result):
    return result[0] if isinstance(result, tuple) else result


def of_backward(name, args, result):
    """Positional arguments of op `name`'s backward op, for the result of the op with `args`."""
    grad = torch.ones_like(first(result))
    if name == "target_attention":
        return (grad, None, *args[:3], *result, *args[3:])
    return (grad, *args, result if name == "softmax_score" else result[1])
