"""The documentation's Python runs, and its links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from ptxemu import counts_page

from attnrec.ops.backends import TRITON_FIRST

ROOT = Path(__file__).resolve().parents[1]
GPU_MODEL = ROOT / "docs" / "gpu-model.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_code_runs(page):
    """A page's blocks one after the other, as a reader would type them."""
    namespace: dict = {}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [link for link in targets if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def test_readme_has_code():
    assert len(blocks(ROOT / "README.md")) >= 4


@pytest.mark.parametrize(
    ("op", "kernels"),
    [
        ("target_attention", {"target_attention_kernel"}),
        ("target_attention_backward", {"grad_rows_kernel", "grad_events_kernel"}),
        ("catalog_cross_entropy", {"log_sum_kernel"}),
    ],
)
def test_what_explain_says_of_the_model_is_on_its_page(op, kernels):
    rows = re.findall(r"^\| `(\w+)` \| (\w+) D=.* \| ([\d.]+) \|$", GPU_MODEL.read_text(), re.MULTILINE)
    spans = []
    for chip in ("A100", "H100"):
        ratios = [ratio for kernel, of, ratio in rows if kernel in kernels and of == chip]
        spans.append(f"{min(ratios, key=float)} to {max(ratios, key=float)}")
    assert re.findall(r"[\d.]+ to [\d.]+", TRITON_FIRST[op]) == spans


def test_counts_of_the_gpu_kernels_are_those_of_the_results():
    text = counts_page.PAGE.read_text()
    assert counts_page.page(text, json.loads(counts_page.RESULTS.read_text())) == text
