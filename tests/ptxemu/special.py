"""Special registers: thread and block numbers, lane masks, clocks."""

import numpy as np


def _axis(i):
    def tid(S):
        bx, by, _ = S.launch.block
        return (S.thread % bx, S.thread // bx % by, S.thread // (bx * by))[i]

    def ctaid(S):
        gx, gy, _ = S.launch.grid
        b = S.set.block_ids[S.block]
        return (b % gx, b // gx % gy, b // (gx * gy))[i]

    def uniform(value):
        return lambda S: np.full(S.L, value(S))

    return {
        "tid": tid,
        "ctaid": ctaid,
        "ntid": uniform(lambda S: S.launch.block[i]),
        "nctaid": uniform(lambda S: S.launch.grid[i]),
    }


_ONE = np.uint64(1)


def _lane(S):
    return (S.thread % 32).astype(np.uint64)


SPECIAL = {f"%{name}.{c}": f for i, c in enumerate("xyz") for name, f in _axis(i).items()}
SPECIAL |= {
    "%laneid": _lane,
    "%warpid": lambda S: S.thread // 32,
    "%nwarpid": lambda S: np.full(S.L, 64),
    "%smid": lambda S: S.set.block_ids[S.block] % 108,
    "%nsmid": lambda S: np.full(S.L, 108),
    "%gridid": lambda S: np.zeros(S.L),
    "%lanemask_eq": lambda S: _ONE << _lane(S),
    "%lanemask_lt": lambda S: (_ONE << _lane(S)) - _ONE,
    "%lanemask_le": lambda S: (_ONE << _lane(S) << _ONE) - _ONE,
    "%lanemask_gt": lambda S: ~((_ONE << _lane(S) << _ONE) - _ONE) & np.uint64(0xFFFFFFFF),
    "%lanemask_ge": lambda S: ~((_ONE << _lane(S)) - _ONE) & np.uint64(0xFFFFFFFF),
    "%dynamic_smem_size": lambda S: np.full(S.L, S.launch.shared_bytes - S.launch.kernel.shared_bytes),
    "%total_smem_size": lambda S: np.full(S.L, S.launch.shared_bytes),
}
_COUNTERS = ("%clock", "%clock64", "%clock_hi", "%globaltimer", "%globaltimer_lo", "%globaltimer_hi")


def special_register(name):
    """get(group) -> integer array, or None. %clock and %globaltimer count instructions."""
    if name in _COUNTERS:
        shift = 32 if name.endswith("_hi") else 0
        return lambda S: np.full(S.L, S.ticks >> shift, np.uint64)
    f = SPECIAL.get(name)
    if f is None:
        return None

    def get(S):
        if name not in S.cache:
            S.cache[name] = f(S).astype(np.uint32)
        return S.cache[name]

    return get
