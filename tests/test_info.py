"""`attnrec.info`, the facts of `attnrec._C`, and what holds without it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnrec import info
from attnrec._extension import PACKAGE, extension
from attnrec.ops.backends import BACKENDS

ROOT = PACKAGE.parent
needs_extension = pytest.mark.skipif(extension is None, reason="attnrec._C is not built")
TIERS = ["baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"]
CPUINFO_FLAGS = {
    "baseline": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512_bf16": {"avx512_bf16"},
    "amx_bf16": {"amx_tile", "amx_bf16"},
}


def python(code: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, **options)


def test_every_section_speaks():
    sections = info.collect()
    assert list(sections) == ["versions", "build", "cpu", "gpu", "backends"]
    assert all(words for section in sections.values() for words in section.values())
    assert sections["versions"]["torch"].startswith(torch.__version__)
    assert sections["cpu"]["threads"].startswith(str(torch.get_num_threads()))
    assert extension is None or Path(sections["build"]["ops, for C++"]).is_file()


def test_a_backend_is_live_or_says_why_not():
    states = info.backends()
    assert list(states) == [backend.name for backend in BACKENDS]
    assert states["reference"] == "live"
    assert all(words.startswith("live") or len(words) > len("off: ") for words in states.values())


def test_the_state_of_a_backend_that_serves_some_ops():
    class Half:
        name = "half"

        def supports(self, call):
            return "too large" if call.op.name == "catalog_topk" else None

    words = info.state(Half(), info._small_calls("cpu"))
    assert words.startswith("live for target_attention, target_attention_weights, ")
    assert words.endswith("; not for catalog_topk: too large")


@needs_extension
def test_the_cpu_serves_every_op():
    assert info.backends()["cpu"] == "live"


def test_command_line():
    command = [sys.executable, "-m", "attnrec.info", "--json"]
    done = subprocess.run(command, text=True, capture_output=True, check=True)
    assert json.loads(done.stdout) == info.collect()
    done = subprocess.run(command[:-1], text=True, capture_output=True, check=True)
    for section in info.collect().values():
        for what, words in section.items():
            assert what in done.stdout
            assert words in done.stdout


@needs_extension
class TestExtension:
    def test_build_facts(self):
        assert "-ffp-contract=off" in extension.build["flags"]
        assert extension.build["cxx_standard"] >= 201703
        assert bool(extension.build["cuda"]) is not bool(extension.build["why_no_cuda"])

    def test_tiers_are_those_of_the_processor(self):
        """Against the system's own list, where it has one."""
        try:
            with open("/proc/cpuinfo") as lines:
                flags = next(set(line.split()) for line in lines if line.startswith("flags"))
        except (OSError, StopIteration):
            pytest.skip("no /proc/cpuinfo with flags")
        assert extension.tiers_available() == [tier for tier in TIERS if CPUINFO_FLAGS[tier] <= flags]

    @pytest.mark.parametrize("tier", extension.tiers_available() if extension else [])
    def test_the_environment_caps_the_tier(self, tier):
        code = "from attnrec._extension import extension as e; print(e.tier_name())"
        done = python(code, env={**os.environ, "ATTNREC_CPU_TIER": tier})
        assert done.stdout.strip() == tier, done.stderr

    def test_a_tier_that_is_not_there_raises(self):
        code = "import torch, attnrec; x = torch.ones(2, 1, 8); o = torch.tensor([0, 2])\n"
        code += "attnrec.target_attention(x, x, x, o, o)"
        done = python(code, env={**os.environ, "ATTNREC_CPU_TIER": "sse9"})
        assert done.returncode != 0
        assert "ATTNREC_CPU_TIER" in done.stderr
        assert '"sse9"' in done.stderr

    def test_info_survives_a_tier_that_is_not_there(self):
        done = subprocess.run(
            [sys.executable, "-m", "attnrec.info"],
            text=True,
            capture_output=True,
            env={**os.environ, "ATTNREC_CPU_TIER": "sse9"},
        )
        assert done.returncode == 0, done.stderr
        assert 'got "sse9"' in done.stdout

    def test_probes_are_of_the_right_size(self):
        """No processor of 2010 … 2040 is outside these; a probe whose loop was optimised away is."""
        assert 1e8 < extension.probe_flops("float64") < 1e13
        assert 1e9 < extension.probe_flops("float32") < 1e13
        assert 1e8 < extension.probe_read_bandwidth(1 << 24) < 1e12
        assert 1e7 < extension.probe_exp() < 1e12

    @pytest.mark.parametrize(
        ("call", "named"),
        [
            (lambda: extension.probe_flops("int8"), 'dtype must be .* got "int8"'),
            (lambda: extension.probe_flops("float32", 0), "threads must be at least 1, got 0"),
            (lambda: extension.probe_read_bandwidth(0), "bytes must be positive, got 0"),
        ],
    )
    def test_bad_arguments(self, call, named):
        with pytest.raises(ValueError, match=named):
            call()


@pytest.fixture(scope="module")
def without_extension(tmp_path_factory):
    """A folder with an attnrec that has no compiled part."""
    folder = tmp_path_factory.mktemp("plain")
    shutil.copytree(PACKAGE, folder / "attnrec", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    return folder


def test_without_extension_the_reference_serves(without_extension):
    code = (
        "import torch, attnrec\n"
        "x = torch.ones(2, 1, 8, requires_grad=True); o = torch.tensor([0, 2])\n"
        "attnrec.target_attention(x, x, x, o, o).sum().backward()\n"
        "assert x.grad is not None\n"
        "print(attnrec.explain(attnrec.target_attention, x, x, x, o, o).backend, attnrec.__file__)"
    )
    done = python(code, cwd=without_extension)
    assert done.stdout.split() == ["reference", str(without_extension / "attnrec" / "__init__.py")], (
        done.stderr
    )


def test_without_extension_info_says_why(without_extension):
    done = subprocess.run(
        [sys.executable, "-m", "attnrec.info", "--json"],
        text=True,
        capture_output=True,
        cwd=without_extension,
    )
    sections = json.loads(done.stdout)
    assert sections["build"]["extension"].startswith("none: ")
    assert sections["backends"]["cpu"].startswith("off: ")
    assert sections["backends"]["reference"] == "live"


def test_a_source_tree_that_is_not_installed_has_the_kernels(without_extension, tmp_path):
    for folder in ("attnrec", "kernels"):
        shutil.copytree((without_extension if folder == "attnrec" else ROOT) / folder, tmp_path / folder)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "library.cpp").touch()
    code = (
        "import sys\n"
        "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()]\n"
        "import attnrec, attnrec.kernels\n"
        "print(attnrec.kernels.__file__)"
    )
    done = python(code, cwd=tmp_path)
    assert done.stdout.strip() == str(tmp_path / "kernels" / "__init__.py"), done.stderr


def test_import_without_optional_packages(without_extension):
    code = (
        "import sys\n"
        "for name in ('triton', 'matplotlib', 'safetensors', 'tqdm', 'rich'): sys.modules[name] = None\n"
        "import torch, attnrec, attnrec.info\n"
        "attnrec.info.main([])"
    )
    done = python(code, cwd=without_extension)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(3),
        lambda: torch.empty(3, dtype=torch.bfloat16),
        lambda: torch.empty_like(torch.ones(3)),
        lambda: torch.ones(1).new_empty(3),
        lambda: torch.empty_strided((3,), (1,)),
    ],
)
def test_uninitialised_memory_is_poisoned_in_tests(allocate):
    assert allocate().isnan().all()
