"""Growth: one size at a time, the others as they are, to see how time and memory grow with it."""

from __future__ import annotations

import os

from benches.case import Case
from benches.target_attention import DENSE, attention_case

USERS, HEADS, CANDIDATES, EVENTS, DIM = 4, 4, 64, 512, 32
VARIED = {
    "events": (64, 128, 256, 512, 1024, 2048, 4096, 8192),
    "candidates": (1, 4, 16, 64, 256, 1024),
    "users": (1, 4, 16, 64, 256),
    "heads": (1, 2, 4, 8, 16),
    "head dim": (8, 16, 32, 64, 128, 256),
}


def _case(what: str, value: int) -> Case:
    sizes = {"users": USERS, "heads": HEADS, "candidates": CANDIDATES, "events": EVENTS, "head dim": DIM}
    if what in sizes:
        sizes[what] = value
    users = sizes["users"]
    return attention_case(
        f"growth-{what.replace(' ', '-')}/{value}",
        "growth",
        "fp32",
        [sizes["candidates"]] * users,
        [sizes["events"]] * users,
        DENSE,
        heads=sizes["heads"],
        dim=sizes["head dim"],
        varied=(what, value),
        threads=value if what == "threads" else None,
    )


def _threads() -> list[int]:
    """1, 2, 4 … and all."""
    cores = os.cpu_count() or 1
    return sorted({cores, *(1 << n for n in range(cores.bit_length()) if 1 << n < cores)})


CASES = [_case(what, value) for what, values in VARIED.items() for value in values]
CASES += [_case("threads", count) for count in _threads()]
