"""The one reader and the one writer of JSON."""

import json
import math
import os

import pytest

from dblocks.config import json_text, parse_json, read_json


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": [1.0, {"b": math.nan}]}, r"got nan for a\[1\]\['b'\]"),
        ({"bits": math.inf}, "got inf for bits"),
        (-math.inf, "got -inf for the value"),
    ],
)
def test_what_is_not_finite_is_not_written(value, place):
    with pytest.raises(ValueError, match=place):
        json_text(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested at most 64 deep"),
        ("[" * 66 + "]" * 66, "nested at most 64 deep"),
        ('{"a":' * 66 + "1" + "}" * 66, "nested at most 64 deep"),
        ("NaN", "finite numbers, got NaN"),
        ("[-Infinity]", "finite numbers, got -Infinity"),
        ("1e999", "finite numbers, got 1e999"),
        ("9" * 5000, "integers of at most 64 bits"),
        (str(2**63), "integers of at most 64 bits"),
        ("{", "Expecting"),
    ],
)
def test_what_is_beyond_the_limits_is_not_read(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_what_is_within_the_limits_is_read():
    text = "[" * 64 + str(2**63 - 1) + "]" * 64
    assert parse_json(text) == json.loads(text)
    assert parse_json("[Infinity]", infinite=True) == [math.inf]


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "large", "absent", "latin"])
def test_only_a_regular_file_of_some_size_is_opened(tmp_path, kind):
    path = tmp_path / "config.json"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "large":
        path.write_bytes(b"")
        os.truncate(path, 2**34)
    elif kind == "latin":
        path.write_bytes(b'"\xff"')
    with pytest.raises(ValueError, match=r"config\.json cannot be used"):
        read_json(path)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path) == {"a": 1}
