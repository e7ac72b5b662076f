"""Builds `attnrec._C` and maps `kernels/` to `attnrec.kernels`; everything else stands in pyproject.toml.

`python setup.py build_ext --inplace` (or `make build`) compiles what changed. What is compiled, and how, is
decided in build_backend/plan.py.
"""

import os
import shutil
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OPS_LIBRARY = "libattnrec_ops.so"  # as attnrec/_extension.py names it
sys.path.insert(0, str(ROOT))

from build_backend.plan import BuildError, available_memory_gib, make_plan  # noqa: E402

try:
    import torch
except ImportError:  # an sdist and the metadata need no torch
    torch = None

with suppress(
    ImportError
):  # torch's helper looks for ninja on PATH, where an environment not activated is not
    import ninja

    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])


def plan_here():
    environ = dict(os.environ)
    if torch is None:  # nothing is compiled, so nothing can be required: pip asks before it has found torch
        environ.pop("ATTNREC_CUDA", None)
    return make_plan(
        ROOT,
        environ,
        torch_cuda=torch.version.cuda if torch else None,
        nvcc=shutil.which("nvcc"),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=available_memory_gib(),
    )


def build_facts(plan) -> str:
    """A header with what csrc/module.cpp reports and the compiler does not know."""
    return (
        "#pragma once\n"
        f'#define ATTNREC_BUILD_FLAGS "{" ".join(plan.cxx_flags)}"\n'
        f'#define ATTNREC_BUILD_CUDA "{plan.cuda or ""}"\n'
        f'#define ATTNREC_BUILD_WHY_NO_CUDA "{plan.why_no_cuda}"\n'
    )


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@contextmanager
def one_at_a_time(path: Path):
    """Two builds into one folder would write over each other's objects: the second waits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        except ImportError:  # no such locks on Windows
            pass
        yield


def in_two_libraries(link):
    """`link`, the linker's call for the extension, so that the ops become a library of their own.

    Of the objects only module.o knows Python: a C++ program loads the other library alone
    (examples/serve_cpp), and the extension finds it in its own folder.
    """

    def linked(objects, path, *args, extra_postargs=(), **options):
        ops = str(Path(path).with_name(OPS_LIBRARY))
        module = [name for name in objects if Path(name).name == "module.o"]
        rest = [name for name in objects if name not in module]
        flags = list(extra_postargs or ())
        link(rest, ops, *args, extra_postargs=[*flags, f"-Wl,-soname,{OPS_LIBRARY}"], **options)
        link([*module, ops], path, *args, extra_postargs=[*flags, "-Wl,-rpath,$ORIGIN"], **options)

    return linked


class BuildWithoutTorch(build_ext):
    def run(self):
        raise BuildError(
            "attnrec's extension is compiled against torch >= 2.11, and there is none here. Install torch "
            "first (any build of it, CPU or CUDA), then attnrec; see docs/install.md."
        )


def torch_build_ext():
    class BuildWithTorch(cpp_extension.BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            if self.inplace or self.editable_mode:
                # setuptools gives an editable install a new temporary folder each time; in this one
                # `make build` and `pip install -e .` find each other's objects.
                self.build_temp = str(ROOT / "build" / "objects")

        def build_extensions(self):
            generated = Path(self.build_temp).resolve() / "generated"
            write_if_changed(generated / "attnrec_build.h", build_facts(plan))
            for extension in self.extensions:
                extension.include_dirs.append(str(generated))
                extension.libraries = [name for name in extension.libraries if name != "torch_python"]
            self.compiler.link_shared_object = in_two_libraries(self.compiler.link_shared_object)
            with one_at_a_time(Path(self.build_temp) / "lock"):
                super().build_extensions()

        def copy_extensions_to_source(self):
            super().copy_extensions_to_source()
            self.copy_file(str(Path(self.build_lib) / "attnrec" / OPS_LIBRARY), str(ROOT / "attnrec"))

    return BuildWithTorch


def extension():
    arguments = {
        "include_dirs": [str(ROOT / "csrc")],
        "depends": plan.depends,
        "extra_link_args": plan.link_flags,
        "language": "c++",
    }
    if torch is None:
        return Extension("attnrec._C", plan.sources, **arguments)
    kind = cpp_extension.CUDAExtension if plan.cuda else cpp_extension.CppExtension
    flags = {"cxx": plan.cxx_flags, "nvcc": plan.nvcc_flags}
    return kind("attnrec._C", plan.sources, extra_compile_args=flags, **arguments)


plan = plan_here()
os.environ.update(plan.environment)
if torch is not None:
    from torch.utils import cpp_extension  # now, because it looks for CUDA_HOME when it is imported
setup(
    packages=[*find_packages(include=["attnrec", "attnrec.*"]), "attnrec.kernels"],
    package_dir={"attnrec.kernels": "kernels"},
    package_data={"attnrec.kernels": ["tables/*.json"]},
    ext_modules=[extension()],
    cmdclass={"build_ext": torch_build_ext() if torch else BuildWithoutTorch},
)
