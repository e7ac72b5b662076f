"""Reader of atomic files, order of events, splits, statistics, and the real data set's protocol."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
import recommender_data
import torch

pytest.importorskip(
    "torchmetrics", reason="the recommender needs the extra: pip install 'attnrec[recommender]'"
)

from attnrec.recommender import movielens
from attnrec.recommender.atomic import AtomicFileError, DataSetError, read_atomic
from attnrec.recommender.data import TEST, TRAIN, VALID, Fields, load, ranking_split, retrieval_split
from attnrec.recommender.features import Categories, Dense, Statistics, encode
from attnrec.recommender.tasks import encode_data, popularity, shuffle_ties


@pytest.fixture
def tiny(tmp_path):
    return load(recommender_data.write(tmp_path / "tiny"))


def write(path, text):
    path.write_text(text)
    return path


def test_every_column_type(tmp_path):
    text = "a:token\tb:token_seq\tc:float\td:float_seq\nx\tp q\t1.5\t1 2\n\t\t\t\n"
    assert read_atomic(write(tmp_path / "f.item", text))["b"] == [["p", "q"], []]
    columns = read_atomic(tmp_path / "f.item")
    assert columns["a"] == ["x", ""]
    assert columns["c"][0] == 1.5
    assert np.isnan(columns["c"][1])
    assert columns["d"] == [[1.0, 2.0], []]


def test_windows_line_ends_and_empty_lines_at_the_end(tmp_path):
    columns = read_atomic(write(tmp_path / "f.item", "a:token\tb:float\r\nx\t1\r\ny\t2\r\n\r\n\r\n"))
    assert columns == {"a": ["x", "y"], "b": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a:token\tb:float\nx\t1\ny\n", 3, "1 fields, the header has 2"),
        ("a:token\tb:float\nx\t1\ty\n", 2, "3 fields"),
        ("a:token\tb:float\nx\t1\n\n\ny\t1\n", 3, "an empty line"),
        ("a:token\tb:float\nx\tone\n", 2, "column b (float): got 'one'"),
        ("a:token\tb:float\nx\tinf\n", 2, "column b (float): got 'inf'"),
        ("a:token\tb:float_seq\nx\t1 -inf\n", 2, "column b (float_seq): got '1 -inf'"),
        ("a:token\tb:float_seq\nx\t1 two\n", 2, "column b (float_seq): got '1 two'"),
        ("a:token\tb:number\n", 1, "header field 'b:number'"),
        ("a:token\ta:float\n", 1, "column a is there twice"),
        ("a\n", 1, "header field 'a'"),
        ("", 1, "header field ''"),
    ],
    ids=[
        "short",
        "long",
        "blank",
        "number",
        "infinite",
        "infinite in a row",
        "numbers",
        "type",
        "twice",
        "untyped",
        "empty",
    ],
)
def test_malformed_rows_are_reported_by_file_and_line(tmp_path, text, line, message):
    path = write(tmp_path / "bad.inter", text)
    with pytest.raises(AtomicFileError) as caught:
        read_atomic(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert message in str(caught.value)


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "bad.item").write_bytes(b"a:token\nx\n\xff\n")
    with pytest.raises(AtomicFileError, match=r"bad\.item:3: .*UTF-8"):
        read_atomic(tmp_path / "bad.item")


INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


def test_events_are_in_order_of_time_then_row(tmp_path):
    rows = "b\tx\t1\t5\na\tx\t2\t9\nb\ty\t3\t2\nb\tz\t4\t5\nb\tw\t5\t5\n"
    data = load(write(tmp_path / "t.inter", INTER + rows).parent)
    assert data.user_names == ["a", "b"]  # without a .user file by name
    names = [data.item_names[item] for item in data.item[data.history(1)]]
    assert names == ["y", "x", "z", "w"]
    assert data.position.tolist() == [0, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("inter", "extra", "message"),
    [
        (INTER + "a\tx\t\t5\n", {}, r"t\.inter:2: an event without"),
        ("user_id:token\titem_id:token\ttimestamp:float\na\tx\t5\n", {}, "no column rating"),
        (INTER, {}, r"t\.inter: no events"),
        (
            INTER.replace("rating:float", "rating:token") + "a\tx\tgood\t5\n",
            {},
            "rating must be of type float",
        ),
        (
            INTER.replace("user_id:token", "user_id:float") + "1\tx\t1\t5\n",
            {},
            "user_id must be of type token",
        ),
        (INTER + "a\tx\t1\t5\n", {"t.item": "item_id:token\ny\n"}, "1 items of the events are not there"),
        (INTER + "a\tx\t1\t5\n", {"t.user": "user_id:token\na\na\n"}, "a user is there twice"),
        (INTER + "a\tx\t1\t5\n", {"t.user": "name:token\na\n"}, "no column user_id"),
    ],
    ids=[
        "missing value",
        "missing column",
        "no events",
        "rating in words",
        "user in numbers",
        "unknown item",
        "user twice",
        "no id",
    ],
)
def test_data_that_does_not_fit_together(tmp_path, inter, extra, message):
    write(tmp_path / "t.inter", inter)
    for name, text in extra.items():
        write(tmp_path / name, text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_other_column_names(tmp_path):
    write(tmp_path / "t.inter", "u:token\ti:token\tr:float\tt:float\na\tx\t1\t5\n")
    data = load(tmp_path, Fields(user="u", item="i", rating="r", time="t"))
    assert (data.user_names, data.item_names) == (["a"], ["x"])


def test_a_folder_without_events(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"want one \.inter file, found 0"):
        load(tmp_path)


def test_retrieval_split_is_leave_one_out(tiny):
    split = retrieval_split(tiny)
    for user in range(len(tiny.user_names)):
        mine = split[tiny.history(user)].tolist()
        assert mine == [TRAIN] * (len(mine) - 2) + [VALID, TEST]


def test_ranking_split_is_by_tenths(tiny):
    split = ranking_split(tiny)
    for user in range(len(tiny.user_names)):
        mine = split[tiny.history(user)].tolist()
        tenth = len(mine) // 10
        assert tenth >= 1
        assert mine == [TRAIN] * (len(mine) - 2 * tenth) + [VALID] * tenth + [TEST] * tenth


def test_ties_are_shuffled_and_nothing_else(tiny):
    rows = np.flatnonzero(retrieval_split(tiny) == TRAIN)
    order = shuffle_ties(tiny, rows, torch.Generator().manual_seed(1)).numpy()
    assert (np.sort(order) == np.arange(len(order))).all()
    assert (order != np.arange(len(order))).any()
    moved = order != np.arange(len(order))
    assert (tiny.user[order] == tiny.user).all()
    assert (tiny.time[order] == tiny.time).all()
    assert np.isin(np.flatnonzero(moved), rows).all()


def test_features_of_every_kind():
    categories = encode(["b", "a", "", "b"])
    assert isinstance(categories, Categories)
    assert categories.multi_hot().tolist() == [[False, True], [True, False], [False, False], [False, True]]
    bags = encode([["x", "y"], [], ["y"]])
    assert bags.multi_hot().tolist() == [[True, True], [False, False], [False, True]]
    dense = encode([[1.0, 5.0], [3.0, 5.0], []])
    assert isinstance(dense, Dense)
    torch.testing.assert_close(dense.values, torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match=r"lengths \[1, 2\]"):
        encode([[1.0], [1.0, 2.0]])


def test_vectors_of_different_lengths_are_told_by_column(tmp_path):
    write(tmp_path / "t.inter", INTER + "a\tx\t1\t5\na\ty\t1\t6\n")
    write(tmp_path / "t.item", "item_id:token\tclass:float_seq\nx\t1\ny\t1 2\n")
    with pytest.raises(DataSetError, match=r"column class: .* lengths \[1, 2\]"):
        encode_data(load(tmp_path))


def test_a_rating_that_comes_later_has_the_level_of_the_same_one_before(tmp_path):
    """3.7 in float32 is more than 3.7."""
    rows = "".join(f"a\tx{n}\t{rating}\t{n}\n" for n, rating in enumerate((1.2, 2.1, 3.7, 4.4)))
    encoded = encode_data(load(write(tmp_path / "t.inter", INTER + rows).parent))
    assert [encoded.level(rating) for rating in (1.2, 2.1, 3.7, 4.4)] == encoded.levels.tolist()


def test_statistics_against_a_loop_over_events(tiny):
    likes = tiny.rating >= 4
    counted = ranking_split(tiny) == TRAIN
    found = Statistics(tiny, likes, counted).before_events().numpy()
    middle = tiny.rating[counted].mean()
    for row in range(len(tiny.user)):
        before = slice(tiny.history(tiny.user[row]).start, row)
        same = counted & (tiny.item == tiny.item[row]) & (tiny.time < tiny.time[row])
        sign = np.where(likes, 1.0, -1.0)
        recent = slice(max(before.start, row - 15), row)
        want = [
            np.log1p(same.sum()) / 5,
            (tiny.rating[same] - middle).sum() / (same.sum() + 5),
            sign[same].sum() / (same.sum() + 5),
            np.log1p(row - before.start) / 5,
            (tiny.rating[before] - middle).sum() / (row - before.start + 3),
            sign[before].sum() / (row - before.start + 3),
            sign[recent].sum() / (row - recent.start + 3),
        ]
        np.testing.assert_allclose(found[row], want, rtol=1e-4, atol=1e-5)


def test_statistics_now_count_all_that_happened(tiny):
    likes = tiny.rating >= 4
    counted = np.ones(len(tiny.user), dtype=bool)
    now = Statistics(tiny, likes, counted).now(3, np.array([5])).numpy()[0]
    assert now[0] == pytest.approx(np.log1p((tiny.item == 5).sum()) / 5)
    assert now[3] == pytest.approx(np.log1p(tiny.lengths[3]) / 5)


def test_wheel_with_other_files_is_refused(tmp_path):
    wheel = tmp_path / "recbole.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in movielens.SHA256:
            archive.writestr(movielens.INSIDE + name, "not the data")
    with pytest.raises(movielens.DataError, match="SHA-256"):
        movielens.extract(wheel, tmp_path)
    assert not any((tmp_path / name).exists() for name in movielens.SHA256)


def test_wheel_without_the_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.whl", "w"):
        pass
    with pytest.raises(movielens.DataError, match="ml-100k"):
        movielens.extract(tmp_path / "other.whl", tmp_path)


def test_changed_file_in_the_cache_is_noticed(tmp_path):
    for name in movielens.SHA256:
        (tmp_path / name).write_text("changed")
    with pytest.raises(movielens.DataError, match="SHA-256"):
        movielens.movielens_100k(tmp_path)


@pytest.fixture(scope="module")
def real():
    try:
        return load(movielens.movielens_100k())
    except movielens.DataError as error:
        if "could not download" not in str(error):
            raise
        pytest.skip(f"MovieLens-100k is neither cached nor to be had: {error}")


def test_movielens_counts(real):
    assert (len(real.user_names), len(real.item_names), len(real.user)) == (943, 1682, 100_000)
    assert real.lengths.min() == 20
    assert np.bincount(retrieval_split(real)).tolist() == [100_000 - 2 * 943, 943, 943]
    tenths = int((real.lengths // 10).sum())
    assert np.bincount(ranking_split(real)).tolist() == [100_000 - 2 * tenths, tenths, tenths]


def test_movielens_popularity_baseline(real):
    found = popularity(encode_data(real))
    assert round(found["hr@10"], 4) == 0.0859
    assert round(found["ndcg@10"], 4) == 0.0449
