"""Plants faults in the compiled PTX of the project's kernels and runs the contract suite on each: which are
not noticed?

    python -m tests.ptxemu.mutate --kernel _forward --mutants 60 tests/test_target_attention.py

(and options of pytest). First the tests run once as they are; of every kernel named it is noted which
compiled form (PTX) which test launches, which lines of it run, and which bits it writes. Then faults are
planted in lines that run, and for each the tests that launch its form run, the quick ones first, until one
fails. A survivor is listed with whether it wrote other bits than the kernel does. One that no input could
tell from the kernel is put on the list in equivalent.json, with the reason; every other one is a gap in the
tests. Exits with 1 where a survivor is not on the list.
"""

import argparse
import contextlib
import gc
import hashlib
import io
import json
import os
import random
import re
import signal
import sys
import time
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("CI", "1")  # hypothesis draws the same examples each time
os.environ["ATTNREC_TEST_RUNNER"] = "emulator"

import hypothesis
import pytest
import torch
import triton

from ptxemu import session
from ptxemu.mutations import KINDS, mutants

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent.parent / "kernels", Path(triton.__file__).parent / "language"


# --- the list of those that no input could tell from the kernel ---------------------------------------------


@cache
def source_line(file, number):
    path = next(folder / file for folder in SOURCES if (folder / file).exists())
    return f"{file}: {path.read_text().splitlines()[int(number) - 1].strip()}"


def identity(kernel, ptx, mutant):
    """What says which fault it is, as long as that line of the source stays: registers have no numbers."""
    lines = ptx.split("\n")
    first = next(i for i, line in enumerate(lines) if re.search(rf"\.entry\s+{re.escape(kernel)}\b", line))
    found = [re.search(r"\.loc\s.*// ([\w.]+):(\d+)", line) for line in lines[first : mutant.line]]
    places = [source_line(m[1], m[2]) for m in found if m and m[2] != "0"]
    instruction = re.sub(r"(%[a-z]+|__BB\d+_)\d+", r"\1", " ".join(mutant.old.split("//")[0].split()))
    return {
        "kernel": f"{places[0].partition(':')[0]}: {kernel}",
        "kind": mutant.kind,
        "source": places[-1],
        "instruction": instruction,
    }


def reason_for(what):
    """Why no input could tell that fault, from equivalent.json; None where it is not there.

    What an entry leaves out it says of all: of a kind, or of a source line."""
    for group in json.loads((HERE / "equivalent.json").read_text()):
        if any(entry.items() <= what.items() for entry in group["mutants"]):
            return group["reason"]
    return None


# --- running the tests --------------------------------------------------------------------------------------


class Observer:
    """What each test launches: (form of the kernel, digest of what was written)."""

    def __init__(self, kernels, only=None):
        self.kernels, self.only, self.test = kernels, only, None
        self.launches = defaultdict(list)  # test -> launches, in order
        self.forms = {}  # digest of the PTX -> (kernel, PTX)
        self.lines = defaultdict(set)  # digest of the PTX -> its lines that some test runs
        self.seconds = Counter()  # of each test

    def pytest_configure(self, config):
        settings = hypothesis.settings  # the first example that fails is enough
        phases = hypothesis.Phase.explicit, hypothesis.Phase.generate
        settings.register_profile("mutate", settings(phases=phases, report_multiple_bugs=False))
        settings.load_profile("mutate")

    @pytest.hookimpl(trylast=True)  # of what the runner keeps
    def pytest_collection_modifyitems(self, items):
        if self.only is not None:
            by_name = {item.nodeid: item for item in items}
            items[:] = [by_name[name] for name in self.only]

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item):
        self.test, began = item.nodeid, time.process_time()
        yield
        self.seconds[item.nodeid] = time.process_time() - began

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
    session.MOST = 0  # what only the order of warps tells is a race too
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
        signal.alarm(limit)
        with os.fdopen(write, "w") as f:
            f.write(json.dumps(function()))
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as f:
        text = f.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else None


def judge(mutant, form, arguments, tests, observer, limit):
    """ "noticed", "survived" (and wrote other bits), "same bits" or "no end" within `limit` seconds."""
    seen = Observer(observer.kernels, tests)

    def edit(name, ptx):
        return mutant.plant(ptx) if hashlib.sha256(ptx.encode()).hexdigest() == form else ptx

    def attempt():
        status, _ = run(arguments, seen, edit)
        if status != 0:
            return "noticed"
        same = all(seen.launches[test] == observer.launches[test] for test in tests)
        return "same bits" if same else "survived"

    return in_child(attempt, limit) or "no end"


def choose(observer, using, forms, count, seed):
    """`count` mutants of each kernel, in lines that run, the kinds in turn, in the `forms` forms of it that
    most tests launch: what one test launches may be there to be held against itself only."""
    rng = random.Random(seed)
    by_kind = defaultdict(lambda: {kind: [] for kind in KINDS})
    taken = Counter()
    for form, (kernel, ptx) in sorted(observer.forms.items(), key=lambda x: (-len(using[x[0]]), x[0])):
        taken[kernel] += 1
        for mutant in mutants(ptx, kernel) if taken[kernel] <= forms else ():
            if mutant.line in observer.lines[form]:
                by_kind[kernel][mutant.kind].append((form, kernel, mutant))
    for kernel, kinds in sorted(by_kind.items()):
        print(f"{kernel}: {sum(map(len, kinds.values()))} mutants in lines that run", flush=True)
        for found in kinds.values():
            rng.shuffle(found)
        chosen = []
        while len(chosen) < count and any(kinds.values()):
            chosen += [found.pop() for found in kinds.values() if found]
        yield from chosen[:count]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.ptxemu.mutate")
    parser.add_argument("--kernel", action="append", default=[], help="its name; default: all launched")
    parser.add_argument("--mutants", type=int, default=13, help="how many of each kernel (default 13)")
    parser.add_argument("--forms", type=int, default=2, help="of how many compiled forms of it (default 2)")
    parser.add_argument("--kind", action="append", choices=KINDS, help="only mutants of this kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=120, help="seconds for a mutant (default 120)")
    options, arguments = parser.parse_known_args(argv)
    torch.set_num_threads(1)  # the process forks
    for kind in set(KINDS) - set(options.kind or KINDS):
        del KINDS[kind]

    observer = Observer(options.kernel)
    status, output = run(arguments, observer)
    if status != 0:
        print(output)
        sys.exit("the tests fail as they are")
    gc.freeze()  # what is there now stays
    using = defaultdict(list)
    for test in sorted(observer.launches, key=observer.seconds.get):
        for form in dict.fromkeys(form for form, _ in observer.launches[test]):
            using[form].append(test)
    results = Counter()
    for form, kernel, mutant in choose(observer, using, options.forms, options.mutants, options.seed):
        verdict = judge(mutant, form, arguments, using[form], observer, options.limit)
        if verdict in ("survived", "same bits"):
            what = identity(kernel, observer.forms[form][1], mutant) | {"verdict": verdict}
            print(f"{verdict}: {mutant}\n  {json.dumps(what)}\n  {len(using[form])} tests, {using[form][0]}")
            reason = reason_for(what)
            print(f"  {reason or 'not on the list'}", flush=True)
            verdict = "equivalent" if reason else verdict
        results[kernel, verdict] += 1
    verdicts = "noticed", "equivalent", "same bits", "survived", "no end"
    print(f"\n{'kernel':24}{''.join(f'{verdict:>12}' for verdict in verdicts)}")
    for kernel in dict.fromkeys(kernel for kernel, _ in results):
        print(f"{kernel:24}{''.join(f'{results[kernel, verdict]:12}' for verdict in verdicts)}")
    sys.exit(any(n for (_, verdict), n in results.items() if verdict not in ("noticed", "equivalent")))


if __name__ == "__main__":
    main()
