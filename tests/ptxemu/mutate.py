"""Plants faults in the compiled PTX of the project's kernels and runs the contract suite on each: which are
not noticed?

    python -m tests.ptxemu.mutate --kernel _forward --mutants 60 tests/test_target_attention.py

(and options of pytest). First the tests run once as they are; of every kernel named it is noted which
compiled form (PTX) which test launches, which lines of it run, and which bits it writes. Then faults are
planted in lines that run, and for each the tests that launch its form run until one fails. A survivor is
listed with its PTX line, and with whether it wrote other bits than the kernel does: one that did not is
equivalent as far as these tests go (a wait that another covers, an operator on zeros), one that did is a gap
in the tests. Exits with 1 where there is such a gap.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import sys
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("CI", "1")  # hypothesis draws the same examples each time
os.environ["ATTNREC_TEST_RUNNER"] = "emulator"

import pytest
import torch

from ptxemu import session
from ptxemu.mutations import KINDS, mutants


class Observer:
    """What each test launches: (form of the kernel, digest of what was written)."""

    def __init__(self, kernels):
        self.kernels, self.test = kernels, None
        self.launches = defaultdict(list)  # test -> launches, in order
        self.forms = {}  # digest of the PTX -> (kernel, PTX)
        self.lines = defaultdict(set)  # digest of the PTX -> its lines that some test runs

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        self.test = item.nodeid

    def observe(self, call, stats):
        digest = hashlib.sha256()
        for buffer, written in stats.written.items():
            digest.update(call.memory.bytes_of(buffer)[written].tobytes())
        form = hashlib.sha256(call.compiled.encode()).hexdigest()
        if call.name in self.kernels or not self.kernels:
            self.forms[form] = call.name, call.compiled
            self.lines[form] |= stats.lines
        self.launches[self.test].append((form, digest.hexdigest()))


def run(arguments, observer, edit=None):
    """pytest's exit status, in this process; without output."""
    session.observe, session.edit, session.max_steps = observer.observe, edit, 1_000_000
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        status = pytest.main(
            [*arguments, "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore"], [observer]
        )
    return int(status), out.getvalue()


def in_child(function, limit):
    """function() in a forked process, as JSON; None where it took longer than `limit` seconds."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        import signal

        signal.alarm(limit)
        with os.fdopen(write, "w") as f:
            f.write(json.dumps(function()))
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as f:
        text = f.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else None


def judge(mutant, form, tests, observer, limit):
    """ "killed", "equivalent" (survived, wrote the same bits) or "survived"."""
    seen = Observer(observer.kernels)

    def edit(name, ptx):
        return mutant.plant(ptx) if hashlib.sha256(ptx.encode()).hexdigest() == form else ptx

    def attempt():
        status, _ = run(tests, seen, edit)
        return [status, all(seen.launches[test] == observer.launches[test] for test in tests)]

    result = in_child(attempt, limit)
    if result is None or result[0] != 0:
        return "killed"
    return "equivalent" if result[1] else "survived"


def choose(observer, count, seed):
    """`count` mutants of lines that run, the kinds in turn."""
    rng = random.Random(seed)
    by_kind = {kind: [] for kind in KINDS}
    for form, (kernel, ptx) in observer.forms.items():
        found = mutants(ptx, kernel)
        running = [mutant for mutant in found if mutant.line in observer.lines[form]]
        print(f"{kernel}: {len(found)} mutants, {len(running)} in lines that run", flush=True)
        for mutant in running:
            by_kind[mutant.kind].append((form, kernel, mutant))
    for found in by_kind.values():
        rng.shuffle(found)
    chosen = []
    while len(chosen) < count and any(by_kind.values()):
        chosen += [found.pop() for found in by_kind.values() if found]
    return chosen[:count]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.ptxemu.mutate")
    parser.add_argument("--kernel", action="append", default=[], help="its name; default: all launched")
    parser.add_argument("--mutants", type=int, default=60, help="how many (default 60)")
    parser.add_argument("--kind", action="append", choices=KINDS, help="only mutants of this kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=120, help="seconds for a mutant (default 120)")
    options, tests = parser.parse_known_args(argv)
    torch.set_num_threads(1)  # the process forks
    for kind in set(KINDS) - set(options.kind or KINDS):
        del KINDS[kind]

    observer = Observer(options.kernel)
    status, output = run(tests, observer)
    if status != 0:
        print(output)
        sys.exit("the tests fail as they are")
    using = defaultdict(list)
    for test, launches in observer.launches.items():
        for form in dict.fromkeys(form for form, _ in launches):
            using[form].append(test)
    results = Counter()
    for form, kernel, mutant in choose(observer, options.mutants, options.seed):
        verdict = judge(mutant, form, using[form], observer, options.limit)
        results[mutant.kind, verdict] += 1
        if verdict != "killed":
            print(f"{verdict}: {kernel}, {mutant} [{len(using[form])} tests, {using[form][0]}]", flush=True)
    print(f"\n{'kind':24}{'killed':>10}{'equivalent':>12}{'survived':>10}")
    for kind in KINDS:
        row = [results[kind, verdict] for verdict in ("killed", "equivalent", "survived")]
        print(f"{kind:24}{row[0]:10}{row[1]:12}{row[2]:10}")
    sys.exit(any(results[kind, "survived"] for kind in KINDS))


if __name__ == "__main__":
    main()
