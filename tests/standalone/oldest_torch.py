"""Compiles the C++ sources against the oldest torch that the package supports (`make oldest`).

Its headers, and the default of its build helper, differ from those of the torch that the tests run with: its
copy of pybind11 refuses what is restricted to the stable ABI, and macros are missing. Only the headers are
taken out of its wheel, and nothing is linked or run. What nvcc compiles includes no header of torch.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from build_backend.plan import TORCH_OLDEST, cuda_home, make_plan  # noqa: E402

FOLDER = ROOT / "build" / "oldest"
VERSION = ".".join(map(str, TORCH_OLDEST)) + ".0"


def headers() -> Path:
    """The folder of that torch's headers, downloaded where it is not there."""
    folder = FOLDER / VERSION
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps"]
        subprocess.run([*pip, "-d", str(FOLDER), f"torch=={VERSION}"], check=True)
        (path,) = FOLDER.glob(f"torch-{VERSION}*.whl")
        with zipfile.ZipFile(path) as wheel:
            partial = folder.with_suffix(".partial")
            names = [name for name in wheel.namelist() if name.startswith("torch/include/")]
            wheel.extractall(partial, names)
        path.unlink()
        partial.rename(folder)
    return folder / "torch" / "include"


def main() -> int:
    torch = headers()
    home = cuda_home(os.environ, shutil.which("nvcc"))
    # With a version of CUDA the plan's sources are those of csrc/cuda too.
    plan = make_plan(ROOT, os.environ, torch_cuda="13.0" if home else None, nvcc=shutil.which("nvcc"))
    sources = [source for source in plan.sources if source.endswith(".cpp")]
    system = [torch, torch / "torch/csrc/api/include", sysconfig.get_path("include")]
    command = [os.environ.get("CXX", "c++"), "-fsyntax-only", *plan.cxx_flags, "-Icsrc"]
    command += ["-Ibuild/objects/generated", *(f"-isystem{folder}" for folder in system)]
    command += [f"-isystem{home}/include"] if home else []

    def compiles(source: str) -> bool:
        return subprocess.run([*command, source], cwd=ROOT).returncode == 0

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failed = [
            source for source, fine in zip(sources, pool.map(compiles, sources), strict=True) if not fine
        ]
    what = "with csrc/cuda" if home else "without csrc/cuda: there is no CUDA toolkit"
    print(f"{len(sources) - len(failed)} of {len(sources)} files compile against torch {VERSION}, {what}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
