"""Plants faults in the compiled PTX of the project's kernels and runs the contract suite on each: which are
not noticed?

    python -m tests.ptxemu.mutate --kernel _forward --mutants 60 target_attention

Ops go one after the other; the default is all. First an op's tests run once as they are; of every kernel it
is noted which compiled form (PTX) which test launches, which lines of it run, and which bits it writes. Then
faults are planted in lines that run. For each the launches of its form are repeated, those of quick tests
first; where one writes other bits, its test runs with the fault, until one fails. What the tests of that
form do not notice is planted at the same place of other forms ("elsewhere": a fault of the source is
noticed, one of the compiler's in that form would not be). A survivor is listed with whether it wrote other
bits. One that no input could tell from the kernel is put on the list in equivalent.json, with the reason;
every other one is a gap in the tests. Exits with 1 where a survivor is not on the list.
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
from bisect import bisect
from collections import Counter, defaultdict
from glob import glob
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("CI", "1")  # hypothesis draws the same examples each time
os.environ["ATTNREC_TEST_RUNNER"] = "emulator"

import hypothesis
import pytest
import torch

from ptxemu import PtxError, session
from ptxemu.mutations import EQUIVALENT, KINDS, mutants, source_lines
from ptxemu.program import load

OPS = "softmax_score", "target_attention", "target_attention_backward", "target_attention_weights"
OPS += "catalog_topk", "catalog_cross_entropy"


# --- the list of those that no input could tell from the kernel ---------------------------------------------


def places_of(kernel, ptx, line=None):
    """The places in the source of the kernel's instructions, up to that line of the PTX: `(where, caller)`,
    each (file, number), or None where nothing calls it."""
    lines = ptx.split("\n")
    first = next(i for i, text in enumerate(lines) if re.search(rf"\.entry\s+{re.escape(kernel)}\b", text))
    files = dict(re.findall(r'\.file\s+(\d+) ".*?([\w.]+)"', ptx))
    place = re.compile(r"\.loc\s(?:.*inlined_at (\d+) (\d+))?.*// ([\w.]+):(\d+)")
    found = [m for text in lines[first:line] if (m := place.search(text)) and m[4] != "0"]
    return [((m[3], m[4]), m[1] and (files[m[1]], m[2])) for m in found]


def plain(line):
    """An instruction without the numbers of registers."""
    return re.sub(r"(%[a-z]+|__BB\d+_)\d+", r"\1", " ".join(line.split("//")[0].split()))


def identity(kernel, ptx, mutant):
    """What says which fault it is, as long as that line of the source stays."""
    texts = [
        place and f"{place[0]}: {source_lines(place[0])[int(place[1]) - 1]}"
        for place in places_of(kernel.partition(": ")[2], ptx, mutant.line)[-1]
    ]
    return {
        "kernel": kernel,
        "kind": mutant.kind,
        "source": texts[0],
        "caller": texts[1],
        "instruction": plain(mutant.old),
    }


def reason_for(what):
    """Why no input could tell that fault, from equivalent.json; None where it is not there.

    What an entry leaves out it says of all: of a kind, or of a source line."""
    for group in EQUIVALENT:
        if any(entry.items() <= what.items() for entry in group["mutants"]):
            return group["reason"]
    return None


# --- running the tests --------------------------------------------------------------------------------------


def digest_of(call, stats):
    """Of all that a launch has written."""
    digest = hashlib.sha256()
    for buffer, written in stats.written.items():
        digest.update(call.memory.bytes_of(buffer)[written].tobytes())
    return digest.hexdigest()


class Observer:
    """What each test launches: (form of the kernel, the Call, its memory before, digest of what it wrote)."""

    def __init__(self, kernels):
        self.kernels, self.test = kernels, None  # kernels: their names; empty for all
        self.launches = defaultdict(list)  # test -> launches, in order
        self.forms = {}  # digest of the PTX -> ("file: kernel", PTX)
        self.lines = defaultdict(set)  # digest of the PTX -> its lines that some test runs
        self.seconds = Counter()  # of each test

    def pytest_configure(self, config):
        settings = hypothesis.settings  # the first example that fails is enough
        phases = hypothesis.Phase.explicit, hypothesis.Phase.generate
        settings.register_profile("mutate", settings(phases=phases, report_multiple_bugs=False))
        settings.load_profile("mutate")

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item):
        self.test, began = item.nodeid, time.process_time()
        yield
        self.seconds[item.nodeid] = time.process_time() - began

    def observe(self, call, stats, before):
        if self.kernels and call.name not in self.kernels:
            return
        code = call.compiled.partition("\t.file\t")[0]  # behind it is where the source lies
        form = hashlib.sha256(code.encode()).hexdigest()
        if form not in self.forms:
            (file, _), _ = places_of(call.name, call.compiled)[0]
            self.forms[form] = f"{file}: {call.name}", call.compiled
        self.lines[form] |= stats.lines
        self.launches[self.test].append((form, call, before, digest_of(call, stats)))


class Only:
    """For pytest: one test."""

    def __init__(self, name):
        self.name = name

    @pytest.hookimpl(trylast=True)  # of what the runner keeps
    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if item.nodeid == self.name]


MOST_STEPS = 300_000
OTHER_FORMS = 4  # with the same place, in which a fault that is not noticed in one is planted


def run(arguments, plugin, observe=None, edit=None):
    """pytest's exit status, in this process; without output."""
    session.observe, session.edit, session.max_steps = observe, edit, MOST_STEPS
    session.MOST = 0  # what only the order of warps tells is a race too
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        status = pytest.main(
            [*arguments, "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore"], [plugin]
        )
    return int(status), out.getvalue()


def in_child(function, limit):
    """function() in a forked process, as JSON; None where it took more than `limit` seconds of CPU."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.setitimer(signal.ITIMER_PROF, limit)
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
    _, ptx = observer.forms[form]
    planted = mutant.plant(ptx)

    def differs(test):
        """Whether the fault changes what the test's launches write; an error ends the test."""
        for of, call, before, digest in observer.launches[test]:
            if of == form:
                call.memory.restore(before)
                call.program = load(planted)
                stats = call.run(memory_stats=False, races=session.races, max_steps=MOST_STEPS)
                if digest_of(call, stats) != digest:
                    return True
        return False

    def attempt():
        some = False
        try:
            for test in tests:
                if differs(test):
                    some = True
                    status, _ = run(
                        arguments, Only(test), edit=lambda name, text: planted if text == ptx else text
                    )
                    assert status != pytest.ExitCode.NO_TESTS_COLLECTED
                    if status != 0:
                        return "noticed"
        except PtxError:
            return "noticed"
        return "survived" if some else "same bits"

    return in_child(attempt, limit) or "no end"


def by_use(observer, using):
    """{kernel: its forms, first those that most tests launch}, all cases of a test being one: what one test
    launches may be there to be held against itself only, or to give zeros."""
    launched_by = {form: len({test.partition("[")[0] for test in tests}) for form, tests in using.items()}
    found = defaultdict(list)
    for form in sorted(launched_by, key=lambda form: (-launched_by[form], form)):
        found[observer.forms[form][0]].append(form)
    return found


def choose(observer, forms, count, seed):
    """`count` mutants of each kernel in lines that run, the kinds in turn, in these forms of it."""
    for kernel in sorted(forms):
        kinds = {kind: [] for kind in KINDS}
        for form in forms[kernel]:
            for mutant in mutants(observer.forms[form][1], kernel.partition(": ")[2]):
                kinds[mutant.kind].append((form, kernel, mutant))
        rng = random.Random(f"{seed} {kernel}")
        for kind, found in kinds.items():
            rng.shuffle(found)  # first, so that a test that runs more leaves the order as it is
            kinds[kind] = [x for x in found if x[2].line in observer.lines[x[0]]]
        print(f"{kernel}: {sum(map(len, kinds.values()))} mutants in lines that run", flush=True)
        chosen = []
        while len(chosen) < count and any(kinds.values()):
            chosen += [found.pop(0) for found in kinds.values() if found]
        yield from chosen[:count]


def alike(mutant, what, observer, form, other):
    """What is at the mutant's place in another form: of the mutants of its kind there, in lines that run, of
    the same instruction but for its numbers, the first of the block that is as far along among those with any
    (of loops with a mask and without, the same)."""

    def general(instruction):
        return re.sub(r"(?<![\w.])\d+|(?<=_param_)\d+", "", plain(instruction))

    def blocks(at):
        kernel, ptx = observer.forms[at]
        labels = [i for i, line in enumerate(ptx.split("\n")) if line.startswith("$L__BB")]
        found = defaultdict(list)
        for x in mutants(ptx, kernel.partition(": ")[2]):
            like = x.kind == mutant.kind and general(x.old) == general(mutant.old)
            if like and x.line in observer.lines[at]:
                place = identity(kernel, ptx, x)
                if all(place[key] == what[key] for key in ("source", "caller")):
                    found[bisect(labels, x.line)].append(x)
        return list(found.values())

    own, there = blocks(form), blocks(other)
    block = next(i for i, some in enumerate(own) if mutant in some)
    return there[block * len(there) // len(own)][0] if there else None


def mutate(op, arguments, options, results):
    """Adds up what becomes of the mutants of the kernels that an op's tests launch, but for other ops'."""
    observer = Observer(options.kernel)
    status, output = run(arguments, observer, observer.observe)
    if status != 0:
        print(output)
        sys.exit("the tests fail as they are")
    gc.freeze()  # what is there now stays
    using = defaultdict(list)
    for test in sorted(observer.launches, key=observer.seconds.get):
        for form in dict.fromkeys(form for form, *_ in observer.launches[test]):
            using[form].append(test)

    def judged(mutant, form):
        return judge(mutant, form, arguments, using[form], observer, options.limit)

    others = {f"{other}.py" for other in OPS} - {f"{op}.py"}
    forms = by_use(observer, using)
    forms = {kernel: found for kernel, found in forms.items() if kernel.partition(":")[0] not in others}
    first = {kernel: found[: options.forms] for kernel, found in forms.items()}
    for form, kernel, mutant in choose(observer, first, options.mutants, options.seed):
        verdict = judged(mutant, form)
        if verdict != "noticed":
            what = identity(kernel, observer.forms[form][1], mutant) | {"verdict": verdict}
            reason = reason_for(what)
            if reason is None:
                places = ((x, alike(mutant, what, observer, form, x)) for x in forms[kernel] if x != form)
                for other, like in islice((place for place in places if place[1]), OTHER_FORMS):
                    if judged(like, other) == "noticed":
                        verdict, reason = "elsewhere", f"noticed in another form: {like}"
                        break
            print(f"{what['verdict']}: {mutant}\n  {json.dumps(what)}")
            print(f"  {len(using[form])} tests, {using[form][0]}\n  {reason or 'not on the list'}")
            sys.stdout.flush()
            if reason and verdict != "elsewhere":
                verdict = "equivalent"
        results[kernel, verdict] += 1


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.ptxemu.mutate")
    parser.add_argument("ops", nargs="*", default=OPS)
    parser.add_argument("-k", help="only tests of this expression, as pytest's -k")
    parser.add_argument("--kernel", action="append", default=[], help="its name; default: all launched")
    parser.add_argument("--mutants", type=int, default=13, help="how many of each kernel (default 13)")
    parser.add_argument("--forms", type=int, default=2, help="of how many compiled forms of it (default 2)")
    parser.add_argument("--kind", action="append", choices=KINDS, help="only mutants of this kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=120, help="seconds for a mutant (default 120)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # the process forks
    for kind in set(KINDS) - set(options.kind or KINDS):
        del KINDS[kind]

    results = Counter()
    for op in options.ops:
        tests = [f"tests/test_{op}.py", *glob(f"tests/test_{op}_triton.py")]
        mutate(op, [*tests, *(["-k", options.k] if options.k else [])], options, results)
    verdicts = "noticed", "elsewhere", "equivalent", "same bits", "survived", "no end"
    print(f"\n{'kernel':50}{''.join(f'{verdict:>12}' for verdict in verdicts)}")
    for kernel in dict.fromkeys(kernel for kernel, _ in results):
        print(f"{kernel:50}{''.join(f'{results[kernel, verdict]:12}' for verdict in verdicts)}")
    sys.exit(any(n for (_, verdict), n in results.items() if verdict not in verdicts[:3]))


if __name__ == "__main__":
    main()
