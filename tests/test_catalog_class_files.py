"""`Catalog.save` and `load`: what was saved comes back, mapped, and a damaged file says so."""

import json
import os
import subprocess
import sys

import pytest
import torch

import attnrec
from attnrec import Catalog, CatalogFileError
from attnrec.catalog import file, filters

safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.cpu_only("files are loaded to the CPU")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FILTERS = ["fp32", "bf16", "int8"]


def assert_equal(a, b):
    assert a.dtype == b.dtype
    left, right = a._items.visible.tensors, b._items.visible.tensors
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name


@pytest.fixture
def path(tmp_path):
    return tmp_path / "catalog.safetensors"


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_saved_comes_back(path, dtype, filter, mmap, monkeypatch):
    catalog = Catalog.pack(torch.randn(70, 5).to(dtype), filter, bias=torch.randn(70))
    catalog.append(torch.randn(3, 5).to(dtype), bias=torch.randn(3))  # and there is room, not to be saved
    catalog.save(path)
    with monkeypatch.context() as patch:
        patch.setattr(filters.Filter, "of", None)  # the filter is read, not made again
        loaded = Catalog.load(path, mmap=mmap)
    assert_equal(loaded, catalog)
    rows = torch.randn(40, 5).to(dtype)
    for one in (loaded, catalog):
        one.update([72, 0], rows[:2])
        one.append(rows, bias=rows[:, 0].float())
    assert_equal(loaded, catalog)


@pytest.mark.parametrize("table", [torch.ones(0, 4), torch.randn(4, 33).t(), torch.randn(66, 8)[::2, ::2]])
def test_no_items_and_any_strides(path, table):
    catalog = Catalog.pack(table, "int8")
    catalog.save(path)
    assert_equal(Catalog.load(path), catalog)


def test_mapped(path, peak_memory):
    """Nothing is read before it is used."""
    Catalog.pack(torch.randn(250_000, 64), "int8").save(path)
    assert path.stat().st_size > 80e6
    with peak_memory() as grown:
        catalog = Catalog.load(path)
        repr(catalog)
    assert grown() < 4e6
    if os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps") as maps:
            assert str(path) in maps.read()
    with peak_memory() as grown:
        catalog.update([3], torch.randn(1, 64))  # pages of its own for what it writes
    assert grown() < 8e6


def test_memory_of_saving(path, peak_memory):
    """The file is written from the catalogue's own memory."""
    catalog = Catalog.pack(torch.randn(250_000, 64), "int8")
    with peak_memory() as grown:
        catalog.save(path)
    assert grown() < 20e6


def test_a_mapped_file_stays_as_it_is(path):
    Catalog.pack(torch.zeros(100, 8), "int8").save(path)
    content = path.read_bytes()
    catalog = Catalog.load(path)
    catalog.update(range(100), torch.ones(100, 8))
    catalog.append(torch.ones(1, 8))
    assert path.read_bytes() == content
    catalog.save(path)  # into the place of the file that others have mapped
    assert torch.equal(Catalog.load(path).rows, torch.ones(101, 8))


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file(path, monkeypatch, error):
    old = Catalog.pack(torch.randn(10, 4))
    old.save(path)

    def fail(tensors, filename, metadata):
        filename.write_bytes(b"half of")
        raise error

    monkeypatch.setattr(safetensors, "save_file", fail)
    new = Catalog.pack(torch.randn(10, 4))
    with pytest.raises(type(error)):
        new.save(path)
    assert_equal(Catalog.load(path), old)
    assert list(path.parent.iterdir()) == [path]
    monkeypatch.undo()
    new.update([0], torch.ones(1, 4))  # and holds no lock
    new.save(path)
    assert_equal(Catalog.load(path), new)


def written(path, change):
    """A good file whose description was changed."""
    catalog = Catalog.pack(torch.randn(40, 6), "int8")
    tensors = dict(catalog._items.visible.tensors)
    description = {"version": 1, "dtype": "int8", "count": 40, "dim": 6, "layout": filters.LAYOUT}
    change(description, tensors)
    safetensors.save_file(tensors, path, metadata={file.KEY: json.dumps(description)})
    return catalog


DAMAGE = {
    "another version": (lambda d, t: d.update(version=2), "version 2 of the format, this attnrec reads 1"),
    "no version": (lambda d, t: d.pop("version"), "no description"),
    "an unknown dtype": (lambda d, t: d.update(dtype="int2"), "not those of"),
    "fewer rows": (lambda d, t: d.update(count=41), "not those of"),
    "no rows": (lambda d, t: t.pop("rows"), "not those of"),
    "codes of another dim": (lambda d, t: t.update(codes=t["codes"][:, :1].clone()), "not those of"),
    "codes of another kind": (lambda d, t: t.update(codes=t["codes"].float()), "not those of"),
    "fewer errors": (lambda d, t: t.update(error=t["error"][:9].clone()), "not those of"),
    "a short bias": (lambda d, t: t.update(bias=torch.ones(39)), "not those of"),
    "integers for rows": (lambda d, t: t.update(rows=t["rows"].int()), "not those of"),
}


def test_a_changed_file_is_a_good_one_without_the_change(path):
    assert_equal(written(path, lambda d, t: None), Catalog.load(path))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_descriptions(path, damage):
    change, message = DAMAGE[damage]
    written(path, change)
    with pytest.raises(CatalogFileError, match=message):
        Catalog.load(path)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_a_truncated_file(path, kept):
    Catalog.pack(torch.randn(100, 8), "int8").save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(CatalogFileError, match="damaged"):
        Catalog.load(path)


def test_foreign_files(path, tmp_path):
    path.write_bytes(b"{}" * 1000)
    with pytest.raises(CatalogFileError, match="not a safetensors file"):
        Catalog.load(path)
    safetensors.save_file({"rows": torch.ones(2, 2)}, path)
    with pytest.raises(CatalogFileError, match="not a catalogue of attnrec"):
        Catalog.load(path)
    with pytest.raises(FileNotFoundError, match="no catalogue"):
        Catalog.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no catalogue"):
        Catalog.load(tmp_path)  # a folder


@pytest.mark.parametrize(
    "change",
    [
        lambda d, t: d.update(layout="another"),
        lambda d, t: [t.pop(name) for name in ("codes", "scale", "error")],
    ],
    ids=["another layout", "saved where there was no filter"],
)
def test_a_filter_that_is_not_there_is_made(path, change):
    catalog = written(path, change)
    assert_equal(Catalog.load(path), catalog)


def test_a_file_of_one_tier_is_searched_on_every_tier(tmp_path):
    table, users = torch.randn(500, 20), torch.ones(1, 20)
    for filter in FILTERS:
        Catalog.pack(table, filter).save(tmp_path / filter)
    code = (
        "import sys, torch, attnrec\n"
        "for path in sys.argv[1:]:\n"
        "    catalog = attnrec.Catalog.load(path)\n"
        "    print(catalog.topk(torch.ones(1, 20), 10)[1].tolist())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *(str(tmp_path / filter) for filter in FILTERS)],
        env=os.environ | {"ATTNREC_CPU_TIER": "baseline"},
        capture_output=True,
        text=True,
        check=True,
    )
    ids = attnrec.catalog_topk(users, table, 10)[1].tolist()
    assert [json.loads(line) for line in run.stdout.splitlines()] == [ids] * 3


def test_without_safetensors(path, monkeypatch):
    catalog = Catalog.pack(torch.ones(2, 2))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (lambda: catalog.save(path), lambda: Catalog.load(path)):
        with pytest.raises(ImportError, match=r"attnrec\[catalog\]"):
            call()
