"""MovieLens-100k, taken out of the wheel of RecBole 1.2.1 and kept in a cache outside the repository.

The data set is GroupLens Research's (F. M. Harper and J. A. Konstan, The MovieLens Datasets: History and
Context, ACM TiiS 5(4), 2015). Its terms: research use with that citation, no redistribution without
permission, no commercial use without permission.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "recbole==1.2.1"
INSIDE = "recbole/dataset_example/ml-100k/"
SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}
LICENSE = """\
MovieLens-100k, GroupLens Research, University of Minnesota.
Research use; cite F. Maxwell Harper and Joseph A. Konstan, "The MovieLens Datasets: History and Context",
ACM Transactions on Interactive Intelligent Systems 5(4), 19, 2015, https://doi.org/10.1145/2827872.
No redistribution and no commercial use without permission: https://files.grouplens.org/datasets/movielens/ml-100k-README.txt
Files from the wheel of RecBole 1.2.1 (the software there is under the MIT licence, the data is not).
"""


class DataError(RuntimeError):
    """The data set could not be had, or is not what it should be."""


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/attnrec`, or `~/.cache/attnrec`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnrec"


def movielens_100k(folder: Path | None = None) -> Path:
    """The folder with the three atomic files; downloads a wheel of 2 MB the first time.

    Args:
        folder: where to keep them, by default in the cache.

    Raises:
        DataError: pip could not download, or a file's checksum is wrong.
    """
    folder = folder or cache_folder() / "movielens-100k"
    if all((folder / name).exists() for name in SHA256):
        for name, expected in SHA256.items():
            _verify(folder / name, (folder / name).read_bytes(), expected)
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        wheel = _download(Path(scratch))
        extract(wheel, folder)
    return folder


def extract(wheel: Path, folder: Path) -> None:
    """Takes the three files out of the wheel; all are verified before one is written."""
    with zipfile.ZipFile(wheel) as archive:
        try:
            contents = {name: archive.read(INSIDE + name) for name in SHA256}
        except KeyError as error:
            raise DataError(f"{wheel.name}: {error.args[0]}") from None
    for name, content in contents.items():
        _verify(Path(name), content, SHA256[name])
    for name, content in {**contents, "LICENSE.txt": LICENSE.encode()}.items():
        # a killed run leaves a whole file or none
        partial = folder / f".{name}.{os.getpid()}"
        partial.write_bytes(content)
        partial.replace(folder / name)


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DataError(
            f"pip could not download {WHEEL}:\n{done.stderr.strip()}\n"
            "Without a network give a folder with the files: --data FOLDER"
        )
    return next(folder.glob("*.whl"))


def _verify(path: Path, content: bytes, expected: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise DataError(f"{path}: SHA-256 is {found}, want {expected}")
