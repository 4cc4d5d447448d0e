import gzip
import hashlib
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dblocks.recipes.data import text, text_sources, tokenizers
from dblocks.recipes.data.folding import DIGITS, letters_and_spaces
from dblocks.recipes.data.windows import random_windows, scored_windows


def test_pydoc_is_a_prefix_of_fixed_size():
    first, again = text.read_text("pydoc"), text.read_text()
    assert first == again
    assert len(first) == text_sources.PYDOC_CHARACTERS
    corpus = text.load_corpus()
    assert corpus.sha256 == hashlib.sha256(first.encode()).hexdigest()
    assert corpus.training.characters == 360_000
    assert corpus.evaluated.characters == 40_000
    assert corpus.tokenizer.decode(corpus.evaluated.tokens.tolist()) == first[360_000:]


def test_selection_never_sees_the_held_out_tail():
    whole = text.read_text()
    corpus = text.load_corpus(part="selection")
    final = text.load_corpus()
    seen = [corpus.tokenizer.decode(t.tokens.tolist()) for t in (corpus.training, corpus.evaluated)]
    assert "".join(seen) == whole[:360_000]
    assert corpus.tokenizer.size == final.tokenizer.size  # one network for both


@given(st.text(min_size=1, max_size=40))
def test_known_characters_round_trip(sample):
    tokenizer = tokenizers.tokenizer_from_json(tokenizers.Characters(sample).to_json())
    assert tokenizer.decode(tokenizer.encode(sample)) == sample
    assert tokenizer.size == len(set(sample) | {tokenizers.UNKNOWN})


def test_unknown_characters_become_one_token():
    tokenizer = tokenizers.Characters("ab")
    assert tokenizer.encode("abc") == [1, 2, 0]
    assert tokenizer.decode([1, 0]) == "a" + tokenizers.UNKNOWN


@given(
    st.text(max_size=20),
    st.text(st.characters(exclude_categories=()), max_size=60),  # single surrogates too
)
def test_numbers_are_those_of_a_dictionary(characters, sample):
    tokenizer = tokenizers.Characters(characters)
    number = {character: i for i, character in enumerate(tokenizer.characters)}
    expected = [number.get(character, 0) for character in sample]
    assert tokenizer.encode(sample) == expected
    tensor = tokenizer.encode_tensor(sample)
    assert (tensor.dtype, tensor.tolist()) == (torch.int64, expected)


def test_long_text_is_looked_up_in_parts(monkeypatch):
    monkeypatch.setattr(tokenizers, "CHARACTERS_AT_A_TIME", 3)
    tokenizer = tokenizers.Characters("a\u00fc\U0001f40d")
    for count in (2, 3, 4, 7):
        sample = "a\u00fcx\U0001f40d\U0001f40e\u00fca"[:count]
        assert tokenizer.encode(sample) == [1, 2, 0, 3, 0, 2, 1][:count]


# The dictionary


def test_letters_and_spaces():
    sample = b"  The 40-year old's\n\tNA\xc3\x8fVE, 1913!Z 9"
    assert letters_and_spaces(sample) == "the four zero year old s na ve one nine one three z nine"
    assert letters_and_spaces(b"0123456789") == " ".join(w.decode() for w in DIGITS)
    assert letters_and_spaces(b" \n!") == ""


@given(st.binary(max_size=60))
def test_nothing_but_words_and_single_spaces_is_left(sample):
    found = letters_and_spaces(sample)
    assert found == " ".join(found.split())
    assert set(found) <= set("abcdefghijklmnopqrstuvwxyz ")
    assert letters_and_spaces(found.encode()) == found


ENTRY = b"""
Largo \\Lar"go\\, a. & adv. [It., large, L. largus.]
   (Mus.) Slow or slowly. [Obs.]
   [1913 Webster]

      [WordNet 1.5 +PJC]
Lari 2.
"""
ENTRY_TEXT = "largo lar go a adv it large l largus mus slow or slowly obs lari two"


@pytest.fixture
def gcide(tmp_path, monkeypatch):
    path = tmp_path / "gcide.dict.dz"
    path.write_bytes(gzip.compress(ENTRY))
    monkeypatch.setattr(text_sources, "GCIDE", path)
    return path


def test_the_dictionary_is_a_prefix_without_its_sources(gcide, monkeypatch):
    assert text.read_text("gcide") == ENTRY_TEXT
    monkeypatch.setattr(text_sources, "GCIDE_CHARACTERS", 30)
    corpus = text.load_corpus("gcide")
    assert (corpus.training.characters, corpus.evaluated.characters) == (27, 3)
    whole = torch.cat([corpus.training.tokens, corpus.evaluated.tokens]).tolist()
    assert corpus.tokenizer.decode(whole) == ENTRY_TEXT[:30]
    assert corpus.sha256 == hashlib.sha256(ENTRY_TEXT[:30].encode()).hexdigest()


def test_without_the_dictionary_its_package_is_named(gcide):
    gcide.unlink()
    with pytest.raises(ValueError, match=r"gcide must be in .*; install Debian's package dict-gci"):
        text.read_text("gcide")


@pytest.mark.parametrize("damage", [lambda c: b"other", lambda c: c[:-9], lambda c: c[:20]])
def test_a_damaged_dictionary_is_named(gcide, damage):
    gcide.write_bytes(damage(gcide.read_bytes()))
    with pytest.raises(ValueError, match=r"gcide\.dict\.dz cannot be read: "):
        text.read_text("gcide")


def test_any_text_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcdefghij" * 10, encoding="utf-8")
    corpus = text.load_corpus(path)
    assert (corpus.training.characters, corpus.evaluated.characters) == (90, 10)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "must be pydoc, gcide, .* or a UTF-8 text file or a folder of them, and"),
        (b"\xff\xfe\x00", "must be a UTF-8 text file"),
        (b"", "must hold some text"),
        (b"a", "long enough to split, got 1 characters"),
    ],
)
def test_a_bad_file_is_a_clear_error(tmp_path, contents, message):
    path = tmp_path / "a.txt"
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(ValueError, match=message):
        text.load_corpus(path)


def test_windows_follow_seed_and_step():
    tokens = torch.arange(100)
    first, again = (random_windows(tokens, 10, 4, seed=1, step=2) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(first - first[:, :1], torch.arange(10).expand(4, 10))
    assert not torch.equal(first, random_windows(tokens, 10, 4, seed=1, step=3))
    assert torch.equal(random_windows(tokens, 100, 2, seed=0, step=0), tokens.expand(2, 100))


@given(st.integers(2, 60), st.integers(2, 20), st.integers(1, 5))
def test_every_token_but_the_first_is_scored_once(count, length, batch_size):
    length = min(length, count)
    scored = []
    for found, mask in scored_windows(torch.arange(count), length, batch_size):
        assert found.shape == mask.shape
        assert found.shape[1] == length
        assert len(found) <= batch_size
        # At least half a window stands before a scored token, but in the first window.
        context = (found - found[:, :1])[mask]
        assert ((context >= length // 2) | (found[mask] < length)).all()
        scored += found[mask].tolist()
    assert sorted(scored) == list(range(1, count))


@pytest.mark.parametrize("windows", [1, 4, 7])
def test_fewer_windows_are_spread_evenly_over_the_text(windows):
    tokens = torch.arange(1003)

    def scored(**options):
        pairs = scored_windows(tokens, 20, 3, **options)
        return [t[m].tolist() for many, mask in pairs for t, m in zip(many, mask, strict=True)]

    every, some = scored(), scored(windows=windows)
    at = [every.index(window) for window in some]
    parts = [(len(every) * i // windows, len(every) * (i + 1) // windows) for i in range(windows)]
    assert all(abs(2 * i - (a + b)) <= 2 for i, (a, b) in zip(at, parts, strict=True))
    assert scored(windows=len(every)) == scored(windows=len(every) + 1) == every
    with pytest.raises(ValueError, match="windows must be positive, got 0"):
        scored(windows=0)


@pytest.mark.parametrize("length", [1, 11])
def test_a_window_must_fit(length):
    with pytest.raises(
        ValueError, match=f"between 2 tokens and those of the text, 10, got {length}"
    ):
        random_windows(torch.arange(10), length, 1, seed=0, step=0)


class FakeTokenizer:
    """What `tokenizers.Tokenizer` offers, with bytes as tokens."""

    def __init__(self, contents):
        if contents != '{"model": {}}':
            raise Exception("no model")
        self.contents = contents

    from_str = classmethod(lambda cls, contents: cls(contents))

    def get_vocab(self):
        return {str(i): i for i in range(256)}

    def encode(self, sample, add_special_tokens):
        assert not add_special_tokens
        return types.SimpleNamespace(ids=list(sample.encode()))

    def decode(self, tokens, skip_special_tokens):
        assert not skip_special_tokens
        return bytes(tokens).decode()

    def to_str(self):
        return self.contents


def test_a_tokenizer_file_counts_characters_of_the_text(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", types.SimpleNamespace(Tokenizer=FakeTokenizer))
    tokenizer = tokenizers.tokenizer_from_json('{"model": {}}')
    path = tmp_path / "a.txt"
    path.write_text("äöü" * 10, encoding="utf-8")
    corpus = text.load_corpus(path, tokenizer=tokenizer)
    assert (len(corpus.training.tokens), corpus.training.characters) == (54, 27)
    assert tokenizer.decode(tokenizer.encode("äh")) == "äh"
    assert tokenizers.tokenizer_from_json(tokenizer.to_json()).size == 256
    with pytest.raises(ValueError, match=r"must be a Hugging Face tokenizer\.json: no model"):
        tokenizers.tokenizer_from_json("{}")


def test_without_tokenizers_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="`pip install tokenizers`"):
        tokenizers.tokenizer_from_json("{}")


def test_a_tokenizer_must_be_json():
    with pytest.raises(ValueError, match="a tokenizer must be a JSON file"):
        tokenizers.tokenizer_from_json("no")


def test_a_byte_order_mark_is_no_character(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"abc" * 10)
    assert text.read_text(path) == "abc" * 10
    path.write_bytes(b'\xef\xbb\xbf{"characters": "ab"}')
    assert tokenizers.read_tokenizer(str(path)).size == 3


def test_a_gap_in_the_numbers_of_a_tokenizer_file_is_counted():
    library = pytest.importorskip("tokenizers")
    model = library.models.WordLevel({"a": 0, "b": 7}, unk_token="a")
    made = library.Tokenizer(model)
    made.pre_tokenizer = library.pre_tokenizers.Whitespace()
    tokenizer = tokenizers.tokenizer_from_json(made.to_str())
    assert tokenizer.encode("a b") == [0, 7]
    assert tokenizer.size == 8
    assert tokenizer.decode([0, 3, 7]) == "a b"
