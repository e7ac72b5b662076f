"""The documentation's Python runs, and its links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from ptxemu import counts_page

ROOT = Path(__file__).resolve().parents[1]
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


def test_counts_of_the_gpu_kernels_are_those_of_the_results():
    text = counts_page.PAGE.read_text()
    assert counts_page.page(text, json.loads(counts_page.RESULTS.read_text())) == text
