"""The CUDA C++ kernels compile for each architecture, every file by itself, without spilling registers.

What was compiled is kept where the emulator keeps its libraries, so that only changed files cost time.
ATTNREC_TEST_FULL=1 compiles for all that a build does by default.
"""

import hashlib
import os
import re
from pathlib import Path

import pytest
from ptxemu import project
from ptxemu.cuda_front import CUDA_HOME, _built, _cache_dir, _run

ARCHS = ["80", "90a", "100"] if os.environ.get("ATTNREC_TEST_FULL") != "1" else ["80", "90a", "100", "120"]
SOURCES = {path.name: path for path in project.KERNELS}
pytestmark = pytest.mark.skipif(project.why_not() is not None, reason=str(project.why_not()))


def report(source: Path, arch: str) -> str:
    """What ptxas says of each kernel."""
    command = [f"{CUDA_HOME}/bin/nvcc", "-std=c++17", "-O3", f"-I{project.CSRC}", f"-I{project.CSRC}/cuda"]
    command += [f"-arch=sm_{arch}", "-Xptxas", "-v", "-Werror", "all-warnings", "-cubin", str(source)]
    texts = [Path(x).read_bytes() for x in (source, *project.headers())]
    tag = hashlib.sha256(repr((command, texts)).encode()).hexdigest()[:16]

    def compile(out: str) -> None:
        said = _run([*command, "-o", f"{out}.cubin"])
        os.remove(f"{out}.cubin")
        Path(out).write_text(said)

    return Path(_built(os.path.join(_cache_dir(), f"{source.stem}_sm_{arch}_{tag}.txt"), compile)).read_text()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", SOURCES)
def test_it_compiles_without_spills(name, arch):
    said = report(SOURCES[name], arch)
    found = re.findall(
        r"Function properties for (\w+)\s+\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", said
    )
    assert len(found) >= said.count("Compiling entry function") > 0
    spilling = {function: bytes for function, *bytes in found if bytes != ["0", "0"]}
    assert not spilling, f"{name} for sm_{arch} spills registers (stores, loads): {spilling}"
