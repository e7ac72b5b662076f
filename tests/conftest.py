"""What holds for every test."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from runners import RUNNER, covering

import attnrec
from attnrec._extension import extension, reason

# benches/ is not installed. Behind everything else, so that this tree's attnrec takes no other one's place.
sys.path.append(str(Path(__file__).resolve().parent.parent))

# Shapes come from hypothesis. The first call of a shape may compile or page in, so no deadline; in CI the
# same examples each time, so that a red run is repeated by running it again.
settings.register_profile(
    "attnrec",
    deadline=None,
    max_examples=RUNNER.examples,
    derandomize="CI" in os.environ,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("attnrec")


def pytest_configure(config):
    """A run must not pass because something else was tested than it was started for."""
    config.addinivalue_line("markers", "cpu_only(reason): not a test of other backends and devices")
    config.addinivalue_line("markers", "gpu: needs a GPU, and is skipped without one")
    if RUNNER.device == "cuda" and not torch.cuda.is_available():
        pytest.exit("ATTNREC_TEST_RUNNER=device, and there is no GPU that torch can use", returncode=2)
    flags = extension.build["flags"] if extension else reason
    for variable, flag, what in (
        ("ATTNREC_EXPECT_SANITIZED", "-fsanitize=address", "with sanitizers"),
        ("ATTNREC_EXPECT_EMULATED_AMX", "-DATTNREC_AMX_EMULATED", "with emulated tile instructions"),
    ):
        if os.environ.get(variable) == "1" and flag not in flags:
            pytest.exit(f"attnrec in {attnrec.__file__} is not built {what}: {flags}", returncode=2)


def pytest_sessionstart(session):
    """Compiled here, the workers of a parallel run need not wait for each other."""
    if RUNNER.name == "cuda-emulator":
        from ptxemu import project

        why_not = project.why_not()
        if why_not is not None:
            pytest.exit(f"ATTNREC_TEST_RUNNER=cuda-emulator, and {why_not}", returncode=2)
        project.libraries()


def pytest_terminal_summary(terminalreporter):
    if RUNNER.name == "cuda-emulator":
        from ptxemu import project

        there = list(project.kernels())
        without = [name for name in attnrec.ops.OPS if name not in there]
        terminalreporter.write_line(f"ops with a CUDA kernel, run here: {', '.join(there)}")
        if without:
            terminalreporter.write_line(f"skipped, as there is none: {', '.join(without)}")


def pytest_collection_modifyitems(config, items):
    """What the runner leaves out (tests/runners.py)."""
    left_out = []
    if RUNNER.name != "native":
        left_out += [item for item in items if item.get_closest_marker("cpu_only")]
    if RUNNER.thin:
        cases: dict[str, list[pytest.Item]] = {}
        for item in items:
            if hasattr(item, "callspec") and item not in left_out:
                cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
        for of_test in cases.values():
            # Values need not be hashable; those of one parameter are the same objects in all cases.
            values = [{name: id(x) for name, x in item.callspec.params.items()} for item in of_test]
            kept = covering(values)
            if RUNNER.most is not None:
                most = min(len(kept), RUNNER.most * (3 if "options" in values[0] else 1))
                kept = [kept[i * len(kept) // most] for i in range(most)]
            left_out += [item for index, item in enumerate(of_test) if index not in kept]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no GPU that torch can use"))
    dropped = set(left_out)
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in dropped]


@pytest.fixture(autouse=True, scope="session")
def the_runner():
    with RUNNER.session():
        yield


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory():
    """Every uninitialised tensor holds NaN (integers: their largest value), so that an element which an op
    forgets to write cannot pass for a right one.

    Torch itself does this where algorithms must be deterministic, for tensors that C++ allocates too.
    """
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def device():
    """Where the ops' tests put their tensors."""
    return torch.device(RUNNER.device)


@pytest.fixture
def fused_calls():
    """What the fused kernels were called with by modules."""
    from helpers_nn import recorded_calls

    with recorded_calls() as calls:
        yield calls


@pytest.fixture
def threads():
    """`threads(n)` sets torch's number of threads for the rest of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def peak_memory():
    """`with peak_memory() as grown: ...; grown()`: by how many bytes the peak of resident memory in the block
    lies above what was resident before it."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))

    @contextmanager
    def measured():
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        except OSError:
            pytest.skip("this system cannot reset the peak of resident memory")
        before = status("VmRSS")
        yield lambda: status("VmHWM") - before

    return measured
