"""What is built, from what, and what ends up in the sdist and the wheel."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = [path for pattern in ("*.py", "tables/*.json") for path in ROOT.glob(f"kernels/{pattern}")]
sys.path.insert(0, str(ROOT))

from attnrec import _extension  # noqa: E402
from build_backend import backend, plan  # noqa: E402


@pytest.fixture
def tree(tmp_path):
    """A source tree with one C++ and one CUDA file."""
    for name in (
        "csrc/library.cpp",
        "csrc/cpu/kernels.cpp",
        "csrc/cpu/tiers/tiers.h",
        "csrc/cuda/kernels.cu",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def fake_torch(folder: Path, version: str) -> Path:
    """A folder of packages in which a torch of this version seems to be installed."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").touch()
    (folder / f"torch-{version}.dist-info").mkdir()
    (folder / f"torch-{version}.dist-info" / "METADATA").write_text(f"Name: torch\nVersion: {version}\n")
    return folder


class TestPlan:
    def test_sources_are_found_by_folder(self, tree):
        found = plan.make_plan(tree, {})
        assert found.sources == ["csrc/cpu/kernels.cpp", "csrc/library.cpp"]
        assert found.depends == ["csrc/cpu/tiers/tiers.h"]

    def test_the_languages_are_ours_not_the_default_of_a_torch(self, tree):
        found = plan.make_plan(tree, {})
        assert "-std=c++20" in found.cxx_flags
        assert "-std=c++17" in found.nvcc_flags

    def test_no_flag_asks_for_this_machine(self, tree):
        flags = plan.make_plan(tree, {}).cxx_flags
        assert "-ffp-contract=off" in flags
        assert not [flag for flag in flags if flag.startswith("-m")]

    @pytest.mark.parametrize(
        ("version", "answer"),
        [
            ("2.10.1", False),
            ("2.11.0", True),
            ("2.13.0+cpu", True),
            ("2.14.1", True),
            ("2.15.0", False),
            ("x", False),
        ],
    )
    def test_supported_torch(self, version, answer):
        assert plan.supported(version) is answer

    @pytest.mark.parametrize(
        ("cores", "memory", "jobs"), [(8, 100.0, 8), (8, 5.0, 2), (8, 0.5, 1), (2, None, 2)]
    )
    def test_jobs_fit_the_memory(self, cores, memory, jobs):
        assert plan.max_jobs(cores, memory) == jobs

    def test_max_jobs_of_the_user_stays(self, tree):
        assert "MAX_JOBS" not in plan.make_plan(tree, {"MAX_JOBS": "3"}, cores=8).environment

    def test_sanitizers_only_on_request(self, tree):
        assert not [flag for flag in plan.make_plan(tree, {}).cxx_flags if "sanitize" in flag]
        found = plan.make_plan(tree, {"ATTNREC_SANITIZE": "1"})
        assert "-fsanitize=address,undefined" in found.cxx_flags
        assert "-fsanitize=address,undefined" in found.link_flags

    def test_tiles_are_emulated_only_on_request(self, tree):
        assert plan.EMULATE_AMX_FLAG not in plan.make_plan(tree, {}).cxx_flags
        assert plan.EMULATE_AMX_FLAG in plan.make_plan(tree, {"ATTNREC_AMX": "emulated"}).cxx_flags
        with pytest.raises(plan.BuildError, match="ATTNREC_AMX is 'on'; it must be native or emulated"):
            plan.make_plan(tree, {"ATTNREC_AMX": "on"})


def test_tile_instructions_are_in_their_tier_and_nowhere_else():
    """Elsewhere they would end the process on a processor without AMX."""
    objects = sorted((ROOT / "build" / "objects" / "csrc").rglob("*.o"))
    if not objects or shutil.which("objdump") is None or platform.machine() != "x86_64":
        pytest.skip("needs objdump and the objects of an x86-64 build in this source tree")
    found = {}
    for path in objects:
        code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", path], capture_output=True, text=True)
        assert code.returncode == 0, code.stderr
        found[path.stem] = set(re.findall(r"\t(ldtilecfg|tile[a-z0-9]+|tdp[a-z0-9]+)\s", code.stdout))
    names = {"ldtilecfg", "tilerelease", "tilezero", "tileloadd", "tilestored", "tdpbf16ps"}
    assert {stem: using for stem, using in found.items() if using} == {"amx_bf16": names}


class TestCuda:
    @pytest.mark.parametrize(
        ("wanted", "torch_cuda", "home", "why"),
        [
            ("off", "13.0", "/cuda", "ATTNREC_CUDA=off"),
            ("auto", None, "/cuda", "the installed torch is a build without CUDA"),
            ("auto", "13.0", None, "no CUDA toolkit was found"),
            ("auto", "13.0", "/cuda", ""),
            ("require", "13.0", "/cuda", ""),
        ],
    )
    def test_decision(self, wanted, torch_cuda, home, why):
        reason = plan.decide_cuda(wanted, torch_cuda, home, ["csrc/cuda/kernels.cu"])
        assert reason.startswith(why)
        assert bool(reason) is bool(why)

    def test_require_says_what_is_missing(self):
        with pytest.raises(
            plan.BuildError, match=r"ATTNREC_CUDA=require, but the installed torch .* without CUDA"
        ):
            plan.decide_cuda("require", None, "/cuda", ["csrc/cuda/kernels.cu"])
        with pytest.raises(plan.BuildError, match="no CUDA sources"):
            plan.decide_cuda("require", "13.0", "/cuda", [])

    def test_unknown_word(self):
        with pytest.raises(plan.BuildError, match=r"'yes'; it must be off, auto or require"):
            plan.decide_cuda("yes", None, None, [])

    def test_links_to_nvcc_are_followed(self, tmp_path):
        real = tmp_path / "cuda-13.0" / "bin" / "nvcc"
        real.parent.mkdir(parents=True)
        real.touch()
        link = tmp_path / "bin" / "nvcc"
        link.parent.mkdir()
        link.symlink_to(real)
        assert plan.cuda_home({}, str(link)) == str(tmp_path / "cuda-13.0")
        assert plan.cuda_home({"CUDA_HOME": "/elsewhere"}, str(link)) == "/elsewhere"
        assert plan.cuda_home({}, None) is None

    def test_a_script_that_runs_the_compiler_is_asked(self, tmp_path):
        (tmp_path / "cuda" / "bin").mkdir(parents=True)
        script = tmp_path / "bin" / "nvcc"
        script.parent.mkdir()
        script.write_text(f"#!/bin/sh\necho '#$ TOP={tmp_path}/cuda/bin/..' >&2\n")
        script.chmod(0o755)
        assert plan.cuda_home({}, str(script)) == str(tmp_path / "cuda")

    def test_sources_and_arch_list(self, tree):
        found = plan.make_plan(tree, {"CUDA_HOME": "/cuda"}, torch_cuda="13.0")
        assert found.sources[-1] == "csrc/cuda/kernels.cu"
        assert found.environment["TORCH_CUDA_ARCH_LIST"] == plan.CUDA_ARCHS
        chosen = {"CUDA_HOME": "/cuda", "TORCH_CUDA_ARCH_LIST": "9.0a"}
        assert "TORCH_CUDA_ARCH_LIST" not in plan.make_plan(tree, chosen, torch_cuda="13.0").environment
        assert plan.make_plan(tree, {"ATTNREC_CUDA": "off"}, torch_cuda="13.0").cuda is None


class TestBorrowing:
    def test_a_supported_torch_is_borrowed(self, tmp_path):
        old = fake_torch(tmp_path / "old", "2.9.1")
        new = fake_torch(tmp_path / "new", "2.13.0")
        assert backend.find_torch([str(tmp_path / "none"), str(old), str(new)]) == str(new)

    def test_what_is_left_of_a_removed_torch_is_not(self, tmp_path):
        folder = fake_torch(tmp_path, "2.13.0")
        (folder / "torch" / "__init__.py").unlink()
        assert backend.find_torch([str(folder)]) is None

    def test_torch_is_required_only_where_there_is_none(self, tmp_path, monkeypatch):
        monkeypatch.setattr(backend, "environment_folders", lambda: [str(tmp_path)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        assert backend.TORCH in backend._requirements([])
        fake_torch(tmp_path, "2.14.1")
        assert backend._requirements([]) == ["ninja"]
        assert sys.path[-1] == str(tmp_path)

    def test_the_range_is_the_one_of_the_package(self):
        assert f'"{backend.TORCH}"' in (ROOT / "pyproject.toml").read_text()


def run(*command, **options) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    # From a copy: setuptools leaves its egg-info in the tree that it packs.
    tree = folder / "tree"
    ignore = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=ignore)
    code = "import sys; from build_backend.backend import build_sdist; build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, folder, cwd=tree)
    (archive,) = folder.glob("attnrec-*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the sdist alone, isolated, as pip does it for a user: with the torch of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    log = run(sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", folder, sdist, cwd=folder)
    assert "Collecting torch" not in log
    (archive,) = folder.glob("attnrec-*.whl")
    return archive


def test_sdist_has_every_source(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.is_file()}
    wanted |= {str(path.relative_to(ROOT)) for path in ROOT.glob("attnrec/**/*.py")}
    wanted |= {str(path.relative_to(ROOT)) for path in KERNELS}
    # The tests run there too, and what the pages link to is there.
    kinds = (".py", ".cpp", ".cu", ".json", ".md", ".sh")
    for folder in ("tests", "benches", "docs"):
        wanted |= {
            str(path.relative_to(ROOT)) for path in ROOT.glob(f"{folder}/**/*") if path.suffix in kinds
        }
    wanted |= {f"examples/serve_cpp/{name}" for name in ("README.md", "Makefile", "export.py", "serve.cpp")}
    wanted |= {
        "build_backend/backend.py",
        "build_backend/plan.py",
        "LICENSE",
        "setup.py",
    }
    assert wanted - names == set()
    assert not [name for name in names if name.endswith(".so")]


def test_wheel_has_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"attnrec"}
    wanted = {str(path.relative_to(ROOT)) for path in ROOT.glob("attnrec/**/*.py")}
    wanted |= {f"attnrec/{path.relative_to(ROOT)}" for path in KERNELS}
    assert wanted - set(names) == set()
    assert len([name for name in names if name.startswith("attnrec/_C")]) == 1
    assert [name for name in names if name.startswith("attnrec/lib")] == ["attnrec/libattnrec_ops.so"]
    assert not [name for name in names if name.endswith((".cpp", ".h", ".cu"))]


def test_wheel_works_where_it_is_installed(wheel, tmp_path):
    """Not from the source tree, whose attnrec would hide it."""
    target = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel)
    code = (
        "import torch, attnrec, attnrec.kernels, attnrec._extension as e\n"
        "assert e.extension is not None, e.reason\n"
        "print(attnrec.__file__, attnrec.kernels.__file__, torch.ops.attnrec.target_attention.default)"
    )
    environ = {**os.environ, "PYTHONPATH": str(target)}
    said = run(sys.executable, "-c", code, cwd=tmp_path, env=environ)
    assert said.count(str(target)) == 2
    assert "attnrec.target_attention" in said


def test_a_tree_that_is_not_built_says_so(tmp_path):
    """`import attnrec` works there, and does not take the compiled part of another tree."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "attnrec", tmp_path / "attnrec", ignore=ignore)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "library.cpp").touch()
    code = "import attnrec, attnrec._extension as e; print(e.extension, e.reason)"
    said = run(sys.executable, "-c", code, cwd=tmp_path)
    assert said.startswith(f"None the source tree {tmp_path} is not built")
    assert "make build" in said


def test_the_reason_names_the_installed_attnrec_that_is_hidden(wheel, tmp_path, monkeypatch):
    site, tree = tmp_path / "site", tmp_path / "tree"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (tree / "csrc").mkdir(parents=True)
    (tree / "csrc" / "library.cpp").touch()
    monkeypatch.setattr(sys, "path", [str(site)])
    assert f"it hides the built attnrec in {site / 'attnrec'}" in _extension.why_missing(tree / "attnrec")


def test_the_reason_names_a_build_for_another_python(tmp_path):
    (tmp_path / "_C.cpython-399-x86_64-linux-gnu.so").touch()
    assert "_C.cpython-399" in _extension.why_missing(tmp_path)
    assert "another Python" in _extension.why_missing(tmp_path)


def test_the_reason_of_an_installation_without_compiled_part(tmp_path):
    assert "installed without its compiled part" in _extension.why_missing(tmp_path / "attnrec")
