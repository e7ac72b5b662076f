"""Loads the compiled part, `attnrec._C`, or says why there is none.

Without it there are no torch ops and the reference serves; `import attnrec` works all the same.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import torch

PACKAGE = Path(__file__).resolve().parent
# The ops without Python, for C++ programs (examples/serve_cpp); `_C` needs it and loads it.
OPS_LIBRARY = PACKAGE / "libattnrec_ops.so"


def installed_elsewhere(package: Path = PACKAGE) -> Path | None:
    """The folder of an installed attnrec with a compiled part that `package` hides, or None."""
    for entry in importlib.metadata.distributions(name="attnrec"):
        folder = Path(str(entry.locate_file("attnrec"))).resolve()
        if folder != package and any(folder.glob("_C*.so")):
            return folder
    return None


def why_missing(package: Path = PACKAGE) -> str:
    """In words: why a package in this folder has no `_C` for this Python."""
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    others = sorted(path.name for path in package.glob("_C*.so"))
    if others:
        return f"{package} has {', '.join(others)}, built for another Python than this one ({python})"
    if not (package.parent / "csrc" / "library.cpp").exists():
        return f"the attnrec in {package} was installed without its compiled part"
    reason = f"the source tree {package.parent} is not built: run `make build` or `pip install -e .` in it"
    hidden = installed_elsewhere(package)
    if hidden is not None:
        reason += f"; it hides the built attnrec in {hidden}: start Python in another folder to use that one"
    return reason


def load() -> tuple[ModuleType | None, str]:
    """`(attnrec._C, "")`, or `(None, the reason)`. Importing it registers the torch ops."""
    # Only the one in this folder: an editable install of another tree would answer for it with its own.
    if PathFinder.find_spec("attnrec._C", [str(PACKAGE)]) is None:
        return None, why_missing()
    try:
        return importlib.import_module("attnrec._C"), ""
    except ImportError as error:  # found, and the dynamic linker refuses it
        return None, (
            f"attnrec._C does not load under torch {torch.__version__} (it serves 2.11 to 2.14): {error}; "
            "reinstall attnrec beside this torch"
        )


extension, reason = load()
