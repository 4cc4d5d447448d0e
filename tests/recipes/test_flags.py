"""Errors on the command line name its flags."""

import ast
from pathlib import Path

import pytest

import dblocks.scale
from dblocks.__main__ import main
from dblocks.recipes.flags import with_flags

NAMES = ["reduce_every", "shared", "resident", "steps", "block", "batch_size", "data"]


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        (
            "reduce_every must be left out without shared='reduce', got 5 and None",
            "--reduce-every must be left out without --shared reduce, got 5 and None",
        ),
        ("steps must be 1, got 0; a block is one", "--steps must be 1, got 0; a block is one"),
        (
            "got block=None, shared='train'; batch_size",
            "got no --block, --shared train; --batch-size",
        ),
        ("without resident=True, resident=False", "without --resident, no --resident"),
        ("run.batch_size was 8 at /a/data=5", "run.batch_size was 8 at /a/data=5"),
        ("--batch-size and x_batch_size stay", "--batch-size and x_batch_size stay"),
    ],
)
def test_fields_become_flags(message, wanted):
    assert with_flags(message, NAMES) == wanted


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--prefetch", "all"), "--prefetch must be left out without --resident, got 'all'"),
        (("--reduce-every", "5"), "--reduce-every must be left out without --shared reduce"),
        (("--steps-per-visit", "0", "--resident"), "--steps-per-visit must be positive, got 0"),
        (("--block", "1", "--shared", "train"), "--shared must be private, frozen or reduce"),
    ],
)
def test_the_command_names_flags(tmp_path, capsys, flags, words):
    assert main(["train", "vit", *flags, "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err


def test_errors_about_several_blocks_do_not_begin_as_those_about_their_number():
    # The command would write --blocks in the place of the word.
    for path in Path(dblocks.scale.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith("blocks must "), (path.name, node.value)
