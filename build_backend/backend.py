"""A PEP 517 backend: setuptools', plus the torch that the user already has.

An isolated build sees nothing of the environment it builds for, so a plain `requires = ["torch"]` downloads
a second torch of several GB, and compiles against that one. This backend looks for a supported torch in the
environment that runs it. Where there is one, it is put at the end of sys.path and not required; where there
is none, torch is required like anything else.
"""

from __future__ import annotations

import site
import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import build_sdist, get_requires_for_build_sdist

from build_backend.plan import supported

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

TORCH = "torch>=2.11,<2.15"


def environment_folders() -> list[str]:
    """Where packages of the environment lie that this interpreter belongs to, isolated or not."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if sys.prefix == sys.base_prefix:  # a virtual environment does not see the user's packages
        folders.append(site.getusersitepackages())
    return list(dict.fromkeys(folders))


def find_torch(folders: list[str]) -> str | None:
    """The first of the folders with a supported torch in it, or None."""
    for folder in folders:
        for found in distributions(name="torch", path=[folder]):
            if supported(found.version) and (Path(folder) / "torch" / "__init__.py").exists():
                return folder
    return None


def borrow_torch() -> bool:
    """Make the environment's torch importable, behind what the build has of its own; False if it has none."""
    folder = find_torch(environment_folders())
    if folder is None:
        return False
    if folder not in sys.path:
        sys.path.append(folder)
    return True


def _requirements(of_setuptools: list[str]) -> list[str]:
    return [*of_setuptools, "ninja", *([] if borrow_torch() else [TORCH, "numpy"])]


def get_requires_for_build_wheel(config_settings=None):
    return _requirements(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _requirements(build_meta.get_requires_for_build_editable(config_settings))


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    borrow_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    borrow_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
