"""Large texts, folders of them, and data sets of Hugging Face on disk."""

import hashlib
import json
import os
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dblocks.recipes.data import text, text_sources
from dblocks.recipes.data.batches import TextData
from dblocks.recipes.data.folding import folded, letters_and_spaces
from dblocks.recipes.data.text import load_corpus

WORDS = "".join(f"line {i} of the text, the {i * i}th\n" for i in range(300))


@pytest.fixture
def mapped(monkeypatch):
    """Texts count as large, and are read in small pieces."""
    monkeypatch.setattr(text, "IN_MEMORY", 0)
    monkeypatch.setattr(text_sources, "PIECE", 50)


def write_parquet(path, rows, column="text"):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table({column: rows}), path)


def write_arrow(path, rows, *, stream=True):
    pa = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"id": list(range(len(rows))), "text": rows})
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def decoded(corpus):
    parts = corpus.training, corpus.evaluated
    return tuple(corpus.tokenizer.decode(part.tokens.tolist()) for part in parts)


# Large texts


@pytest.mark.parametrize("part", ["final", "selection"])
def test_a_large_text_gives_the_same_batches_from_a_file(tmp_path, cache, monkeypatch, part):
    path = tmp_path / "a.txt"
    path.write_text(WORDS + "ä" * 70)
    small = load_corpus(path, part=part)
    assert small.training.tokens.dtype == torch.int64
    monkeypatch.setattr(text, "IN_MEMORY", 0)
    monkeypatch.setattr(text_sources, "PIECE", 100)
    large = load_corpus(path, part=part)
    assert large.training.tokens.dtype == torch.uint8
    assert decoded(large) == decoded(small)
    assert large.sha256 == small.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert large.training.characters == small.training.characters
    assert large.tokenizer.to_json() == small.tokenizer.to_json()
    batches = [TextData(c, 16, 4, seed=1).batch(3)["tokens"] for c in (small, large)]
    assert torch.equal(*batches)
    assert batches[1].dtype == torch.int64


def test_tokens_are_written_once_and_again_for_another_text(tmp_path, cache, mapped, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text(WORDS)
    first = decoded(load_corpus(path))
    files = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert len(files) == 2  # tokens, and the note about them
    with monkeypatch.context() as patch:
        patch.setattr(text, "_tokenize", None)
        again = decoded(load_corpus(path))
    assert again == first
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == files
    # A file that was cut off afterwards is made again.
    tokens = next(file for file in files if file.suffix == ".bin")
    os.truncate(tokens, 10)
    assert decoded(load_corpus(path)) == first
    path.write_text(WORDS.upper())
    os.utime(path, ns=(1, 1))
    assert decoded(load_corpus(path))[0].startswith("LINE 0 OF")


def test_a_run_that_is_killed_leaves_no_tokens_behind(tmp_path, cache, mapped, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text(WORDS)
    with monkeypatch.context() as patch:
        patch.setattr(text, "_encode", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            load_corpus(path)
    assert not list(cache.iterdir())
    assert "".join(decoded(load_corpus(path))) == WORDS


def _interrupt(*_):
    raise KeyboardInterrupt


def test_tokens_have_the_smallest_type():
    sizes = {2: torch.uint8, 256: torch.uint8, 257: torch.uint16, 65536: torch.uint16}
    assert {size: text._dtype(size) for size in sizes} == sizes
    assert text._dtype(65537) == torch.int32


def test_many_characters_are_two_bytes_each(tmp_path, mapped):
    many = "".join(chr(0x4E00 + i % 300) for i in range(1000))
    path = tmp_path / "a.txt"
    path.write_text(many)
    corpus = load_corpus(path)
    assert corpus.training.tokens.dtype == torch.uint16
    assert "".join(decoded(corpus)) == many
    assert len(TextData(corpus, 8, 2, seed=0).digest()) == 64


# Pieces


@given(st.text(st.sampled_from("ab \n\r"), min_size=1, max_size=80), st.integers(1, 9))
def test_pieces_are_the_text(tmp_path_factory, sample, piece):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(sample, newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_sources, "PIECE", piece)
        pieces = list(text_sources.open_text(path).pieces())
        words = "".join(folded(pieces))
    whole = sample.replace("\r\n", "\n").replace("\r", "\n")
    assert "".join(pieces) == whole
    if piece > max(map(len, whole.split()), default=0):
        assert words == letters_and_spaces(whole.encode())


def test_a_folder_holds_out_its_test_files(tmp_path, mapped):
    (tmp_path / "training-monolingual").mkdir()
    (tmp_path / "heldout-monolingual").mkdir()
    for i in range(3):
        (tmp_path / "training-monolingual" / f"news.en-0000{i}-of-00003").write_text(f"train {i}\n")
    (tmp_path / "heldout-monolingual" / "news.en.heldout-00000-of-00001").write_text("hi")
    corpus = load_corpus("lm1b", path=tmp_path)
    unknown = corpus.tokenizer.characters[0]
    assert decoded(corpus) == ("train 0\ntrain 1\ntrain 2\n", "hi".replace("h", unknown))
    selection = load_corpus("lm1b", path=tmp_path, part="selection")
    assert "".join(decoded(selection)) == decoded(corpus)[0]
    assert selection.tokenizer.size == corpus.tokenizer.size


def test_text8_has_its_own_parts(tmp_path):
    letters = letters_and_spaces(WORDS.encode())[:2000]
    (tmp_path / "text8").write_text(letters)
    for path in (tmp_path, tmp_path / "text8"):
        assert decoded(load_corpus("text8", path=path)) == (letters[:1800], letters[1900:])
    selection = load_corpus("text8", path=tmp_path, part="selection")
    assert decoded(selection) == (letters[:1800], letters[1800:1900])
    (tmp_path / "text8").write_text("An article")
    with pytest.raises(ValueError, match=r"of a to z and spaces, got 'A' in .*text8; use .*--fold"):
        load_corpus("text8", path=tmp_path)


def test_any_text_is_folded(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("A 4th!\n" * 30)
    assert "".join(decoded(load_corpus(path, fold="text8"))) == " ".join(["a four th"] * 30)
    with pytest.raises(ValueError, match="fold must be 'text8' or left out, got 'text9'"):
        load_corpus(path, fold="text9")


GLOSS = "00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | {} (living or nonliving)  \n"


def test_wordnet_is_read_where_debian_puts_it(tmp_path, monkeypatch):
    monkeypatch.setattr(text_sources, "WORDNET", tmp_path)
    with pytest.raises(
        ValueError, match=r"data.adj is missing; install Debian's package wordnet-base"
    ):
        load_corpus("wordnet")
    for name in text_sources.WORDNET_FILES:
        (tmp_path / name).write_text("  1 This software\n" + GLOSS.format(name) * 3)
    lines = text.read_text("wordnet").splitlines()
    assert lines[:4] == ["data.adj (living or nonliving)"] * 3 + ["data.adv (living or nonliving)"]
    assert len(lines) == 12
    (tmp_path / "data.noun").write_text(GLOSS.format("x") + GLOSS[:30])
    with pytest.raises(
        ValueError, match=r"data\.noun must hold .* got 1 in 2 lines; it may be cut"
    ):
        load_corpus("wordnet")


# Hugging Face


ROWS = [f"document {i}" for i in range(10)]
JOINED = "".join(f"{row}\n" for row in ROWS)


@pytest.mark.parametrize("kind", ["parquet", "stream", "file", "one"])
def test_texts_of_a_data_set(tmp_path, mapped, kind):
    if kind == "parquet":
        write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", ROWS[:6])
        write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", ROWS[6:])
        write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", ROWS[:2])
    elif kind == "one":
        write_parquet(tmp_path / "a.parquet", ROWS)
        assert text.read_text(tmp_path / "a.parquet") == JOINED
        return
    else:
        write_arrow(tmp_path / "train" / "data-00000.arrow", ROWS, stream=kind == "stream")
        write_arrow(tmp_path / "test" / "data-00000.arrow", ROWS[:2], stream=kind == "stream")
        for left_out in ("train/cache-0a1b.arrow", ".git/train.arrow"):
            write_arrow(tmp_path / left_out, ["left out"])
    assert decoded(load_corpus("openwebtext", path=tmp_path)) == (
        JOINED,
        "document 0\ndocument 1\n",
    )


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("a.parquet", lambda c: c[:-9], r"a\.parquet cannot be read as a parquet file: "),
        ("a.parquet", lambda c: b"", r"a\.parquet cannot be read as a parquet file: "),
        ("a.arrow", lambda c: c[: len(c) // 2], r"a\.arrow cannot be read as a arrow file: "),
        ("a.arrow", lambda c: c[:-8], r"a\.arrow cannot be read .* it may be cut off"),
        ("a.arrow", lambda c: b"other" * 9, r"a\.arrow cannot be read as a arrow file: "),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, damage, message):
    (write_parquet if name.endswith("t") else write_arrow)(tmp_path / name, ROWS * 9)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=message):
        load_corpus("lm1b", path=tmp_path)


@pytest.mark.parametrize(
    ("rows", "column", "message"),
    [
        (["a"], "content", r"a\.parquet must have the column 'text', got \['content'\]"),
        ([1, 2], "text", r"column 'text' .* must be texts, got int in row 0"),
        (["a", None], "text", "must be texts, got NoneType in row 1"),
        ([], "text", "must hold rows, got none"),
    ],
)
def test_columns_are_checked(tmp_path, rows, column, message):
    write_parquet(tmp_path / "a.parquet", rows, column)
    with pytest.raises(ValueError, match=message):
        load_corpus("lm1b", path=tmp_path)


def test_a_saved_data_set_has_all_its_rows(tmp_path):
    write_arrow(tmp_path / "data-00000-of-00001.arrow", ROWS * 4)
    (tmp_path / "state.json").write_text(json.dumps({"_split": "train"}))
    about = {"splits": {"train": {"num_examples": 40}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(about))
    assert text.read_text(tmp_path) == JOINED * 4
    about["splits"]["train"]["num_examples"] = 41
    (tmp_path / "dataset_info.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"must hold 41 rows, as dataset_info.json says, got 40"):
        load_corpus("lm1b", path=tmp_path)


def test_without_pyarrow_its_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pyarrow, .*`pip install 'dblocks\[parquet\]'`"):
        load_corpus("lm1b", path=tmp_path)


# Mistakes


def test_names_and_paths_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"lm1b needs its files: .* by --data-path"):
        load_corpus("lm1b")
    with pytest.raises(
        ValueError, match=r"a path can be given for text8, lm1b, openwebtext, got .*'pydoc'"
    ):
        load_corpus("pydoc", path=tmp_path)
    with pytest.raises(ValueError, match=r"must hold text files: .* got none"):
        load_corpus("lm1b", path=tmp_path)
    with pytest.raises(ValueError, match=r"and .*nowhere does not exist"):
        load_corpus("lm1b", path=tmp_path / "nowhere")
    (tmp_path / "test.txt").write_text("held out")
    with pytest.raises(ValueError, match=r"must hold training files, got test\.txt only"):
        load_corpus(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "some text, got the empty file"), (b"ab\xff", r"b\.txt must be a UTF-8 text file")],
)
def test_a_bad_file_of_a_folder_is_named(tmp_path, content, message):
    (tmp_path / "a.txt").write_text("text" * 20)
    (tmp_path / "b.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_corpus(tmp_path)
