"""Folders as people have them: which files are data, which split they are, and what is left out."""

import bz2
import gzip
import json
import lzma

import pytest

from lowmem.data.files.folders import split_named
from lowmem.data.load import files_by_split, load_data
from lowmem.data.split import train_and_held_out
from lowmem.errors import UserError


def rows(word, count=6):
    return [{"question": f"{word} {i}?", "answer": f"{word} {i}"} for i in range(count)]


def put(path, content):
    """A file of rows (by its suffix), of text or of bytes, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content)
    elif path.suffix == ".parquet":
        import pandas

        pandas.DataFrame(content).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def answers(data):
    return {row["completion"][0]["content"].rpartition(" ")[0] for row in data.rows}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("test.jsonl", "test"),
        ("test/a.jsonl", "test"),
        ("my_test.jsonl", "test"),
        ("MyTest.jsonl", "test"),
        ("testset.jsonl", "test"),
        ("test-00000-of-00002.jsonl", "test"),
        ("test2.v1.jsonl", "test"),
        ("default/test/0000.parquet", "test"),
        ("deep/er/my test data/train.jsonl", "test"),
        ("eval-set/a.jsonl", "validation"),
        ("validation/part-1.jsonl", "validation"),
        ("dev.jsonl", "validation"),
        ("train/dev.jsonl", "validation"),
        ("squad_val2017.jsonl", "validation"),
        ("held-out.jsonl", "heldout"),
        ("hold_out/a.jsonl", "heldout"),
        ("heldout_reserved.jsonl", "heldout_reserved"),
    ],
)
def test_what_is_named_after_another_split_is_never_trained(tmp_path, name, split):
    put(tmp_path / "train" / "a.jsonl", rows("train"))
    put(tmp_path / name, rows("other"))
    assert files_by_split(str(tmp_path)) == {"train": ("train/a.jsonl",), split: (name,)}
    assert answers(load_data(str(tmp_path))) == {"train"}
    assert answers(load_data(str(tmp_path), split=split)) == {"other"}


@pytest.mark.parametrize("name", ["latest", "contest", "protest", "evaluator", "developer", "values", "2017"])
def test_words_that_only_look_like_a_split(name):
    assert split_named(name) is None


def test_the_summaries_list_files_and_rows_by_split(tmp_path):
    put(tmp_path / "train" / "a.jsonl", rows("a", 3))
    put(tmp_path / "train" / "b.jsonl", rows("b", 4))
    put(tmp_path / "validation.jsonl", rows("v", 2))
    put(tmp_path / "test" / "c.jsonl", rows("c", 5))
    train, held_out = train_and_held_out(str(tmp_path))
    assert ": 7 rows" in train.summary()
    assert "files: train/a.jsonl (3), train/b.jsonl (4)" in train.summary()
    assert "left alone: test (test/c.jsonl)" in train.summary()
    assert "(validation): 2 rows" in held_out.summary()
    assert held_out.summary().endswith("files: validation.jsonl (2)")


def test_files_named_after_no_split_train_only_where_no_other_does(tmp_path):
    put(tmp_path / "rows.jsonl", rows("unnamed"))
    put(tmp_path / "test.jsonl", rows("test"))
    assert answers(load_data(str(tmp_path))) == {"unnamed"}
    put(tmp_path / "train.jsonl", rows("train"))
    data = load_data(str(tmp_path))
    assert answers(data) == {"train"}
    assert "not read: rows.jsonl (named after no split)" in data.summary()


def test_a_folder_without_training_data(tmp_path):
    put(tmp_path / "valid.jsonl", rows("v"))
    remedy = f"name a file or folder 'train', or give a file itself, as in {tmp_path / 'valid.jsonl'}"
    with pytest.raises(
        UserError, match=r"has no split 'train'; it has validation \(valid.jsonl\): "
    ) as caught:
        load_data(str(tmp_path))
    assert str(caught.value).endswith(remedy)
    assert answers(load_data(remedy.rpartition(" ")[2])) == {"v"}
    put(tmp_path / "a.json", json.dumps({"test": rows("t")}).encode())
    with pytest.raises(UserError, match=r"it has test .*: name a key 'train'$"):
        load_data(str(tmp_path / "a.json"))


def test_hidden_folders_stay_closed_and_links_lead_nowhere_twice(tmp_path):
    put(tmp_path / "data" / "train.jsonl", rows("train"))
    put(tmp_path / ".ipynb_checkpoints" / "train-checkpoint.jsonl", rows("old"))
    put(tmp_path / ".train.jsonl", rows("hidden"))
    put(tmp_path / "__MACOSX" / "train.jsonl", rows("mac"))
    (tmp_path / "data" / "again").symlink_to(tmp_path)
    data = load_data(str(tmp_path))
    assert (answers(data), len(data.rows)) == ({"train"}, 6)
    assert "not read: .ipynb_checkpoints/, .train.jsonl, __MACOSX/" in data.summary()


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
def test_compressed_files_are_read_and_the_readme_beside_them_is_not(tmp_path, suffix):
    import pyarrow

    raw = "".join(json.dumps(row) + "\n" for row in rows("packed")).encode()
    packers = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    packed = packers[suffix](raw) if suffix in packers else pyarrow.compress(raw, "zstd", asbytes=True)
    put(tmp_path / f"train.jsonl.{suffix}", packed)
    put(tmp_path / "README.md", "# About\n\n" + "This card describes the data. " * 900)
    data = load_data(str(tmp_path))
    assert (answers(data), len(data.rows)) == ({"packed"}, 6)
    assert "not read: README.md" in data.summary()
    put(tmp_path / f"broken.jsonl.{suffix}", packed[: len(packed) // 2])
    with pytest.raises(UserError, match=rf"cannot read .*broken.jsonl.{suffix} as .{suffix}"):
        load_data(str(tmp_path / f"broken.jsonl.{suffix}"))


def test_a_table_and_a_parquet_file_inside_a_compressed_file(tmp_path):
    put(tmp_path / "train.csv.gz", gzip.compress(b"question,answer\nWhat?,That 1\n"))
    assert answers(load_data(str(tmp_path / "train.csv.gz"))) == {"That"}
    put(tmp_path / "a.parquet", rows("p"))
    put(tmp_path / "train.parquet.gz", gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert answers(load_data(str(tmp_path / "train.parquet.gz"))) == {"p"}


def test_a_file_made_to_burst(tmp_path, monkeypatch):
    monkeypatch.setattr("lowmem.data.files.source.BURST", 2**20)
    put(tmp_path / "bomb.jsonl.gz", gzip.compress(b" " * 2**23))
    with pytest.raises(UserError, match="unpacks to more than 200 times its size"):
        load_data(str(tmp_path / "bomb.jsonl.gz"))


@pytest.mark.parametrize("beside", ["train.xlsx", "train.zip", "data/rows.pkl", "a.db", "train.jsonl.7z"])
def test_texts_are_no_data_beside_data_that_cannot_be_read(tmp_path, beside):
    put(tmp_path / "README.md", "About the data.")
    put(tmp_path / "notes.txt", "Some notes.")
    put(tmp_path / beside, b"PK")
    with pytest.raises(UserError) as caught:
        load_data(str(tmp_path))
    assert all(name in str(caught.value) for name in ("holds no data", "README.md", "notes.txt", beside))


def test_a_readme_is_never_data(tmp_path):
    put(tmp_path / "README.md", "About the texts.")
    with pytest.raises(UserError, match=r"holds no data \(README.md\)"):
        load_data(str(tmp_path))
    put(tmp_path / "a.txt", "one")
    put(tmp_path / "b.md", "two")
    data = load_data(str(tmp_path))
    assert [row["text"] for row in data.rows] == ["one", "two"]
    assert "not read: README.md" in data.summary()


def test_what_is_not_read_is_named(tmp_path):
    put(tmp_path / "train.jsonl", rows("t"))
    for name in ("more.xlsx", "notes.txt", "picture.png", "script.py", "x/y.bin", "z.dat"):
        put(tmp_path / name, "x")
    assert (
        "not read: more.xlsx, notes.txt, picture.png, script.py, x/y.bin and 1 more"
        in load_data(str(tmp_path)).summary()
        or "and 1 more" in load_data(str(tmp_path)).summary()
    )


def test_folders_that_datasets_saved(tmp_path):
    from datasets import Dataset, DatasetDict

    one = Dataset.from_list(rows("one"))
    one.save_to_disk(tmp_path / "one")
    assert answers(load_data(str(tmp_path / "one"))) == {"one"}
    parts = {"train_sft": rows("train"), "test_sft": rows("test", 2)}
    DatasetDict({k: Dataset.from_list(v) for k, v in parts.items()}).save_to_disk(tmp_path / "several")
    train, held_out = train_and_held_out(str(tmp_path / "several"))
    assert (answers(train), len(train.rows)) == ({"train"}, 6)
    assert (answers(held_out), held_out.split, len(held_out.rows)) == ({"test"}, "test", 2)
    one.with_format("numpy").select([3, 1]).save_to_disk(tmp_path / "chosen", num_shards=2)
    data = load_data(str(tmp_path / "chosen"))
    assert [row["completion"][0]["content"] for row in data.rows] == ["one 3", "one 1"]
    (lone,) = (tmp_path / "one").glob("*.arrow")
    assert len(load_data(str(lone)).rows) == 6
    (tmp_path / "one" / "state.json").write_text("[]")
    with pytest.raises(UserError, match="cannot read the data set saved in"):
        load_data(str(tmp_path / "one"))


def test_an_object_of_splits(tmp_path):
    put(tmp_path / "all.json", json.dumps({"train": rows("train", 3), "test": rows("test", 2)}))
    for path in (tmp_path / "all.json", tmp_path):
        train, held_out = train_and_held_out(str(path))
        assert (answers(train), len(train.rows)) == ({"train"}, 3)
        assert (answers(held_out), len(held_out.rows)) == ({"test"}, 2)
    put(tmp_path / "all.json", json.dumps({"train": rows("train", 3), "other": rows("o", 2)}))
    data = load_data(str(tmp_path / "all.json"))
    assert answers(data) == {"train"}
    assert "not read: all.json: other (named after no split)" in data.summary()
