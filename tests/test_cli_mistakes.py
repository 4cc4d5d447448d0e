"""Mistakes of the command line that would cost a network, or end in a traceback."""

import json
import re
import subprocess

import pytest

from dblocks import __main__ as cli
from dblocks.__main__ import main
from dblocks.checkpoint import load_model, save_model
from dblocks.recipes.data.tokenizers import Characters
from tools import vit as tiny_vit

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = ("--batch-size", "4", "--width", "8", "--depth", "1", "--heads", "2", "--blocks", "1")
TEXT = ("train", "causal-lm", *SIZES, "--context", "20", "--points", "1")


def mistake(capsys, *argv):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("dblocks: error: ")
    return error


@pytest.fixture
def story(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("0123456789" * 60)
    return str(path)


@pytest.fixture
def trained(story, tmp_path):
    out = tmp_path / "out"
    assert main([*TEXT, "--data", story, "--steps", "1", "--out", str(out)]) == 0
    return out


def test_a_save_is_overwritten_only_if_asked(trained, story, capsys):
    before = (trained / "model.safetensors").read_bytes()
    again = (*TEXT, "--data", story, "--steps", "1", "--seed", "1", "--out", str(trained))
    assert "--out must not exist yet" in mistake(capsys, *again)
    assert "--resume needs a checkpoint" in mistake(capsys, *again, "--resume")
    assert (trained / "model.safetensors").read_bytes() == before
    assert main([*again, "--overwrite"]) == 0
    assert (trained / "model.safetensors").read_bytes() != before


def test_training_that_is_not_finite_saves_nothing(trained, story, capsys):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    args = (*TEXT, "--data", story, "--steps", "9", "--lr", "1e30", "--out", str(trained))
    error = mistake(capsys, *args, "--overwrite")
    assert "training stopped at step" in error
    assert "of block 0 must be finite" in error
    assert "nonfinite=" not in error  # no flag of the command
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before
    assert load_model(trained) is not None


def test_a_tokenizer_of_another_vocabulary_is_an_error(trained, capsys):
    config = json.loads((trained / "config.json").read_text())
    del config["sha256"]
    (trained / "config.json").write_text(json.dumps(config))
    (trained / "tokenizer.json").write_text(Characters("ab").to_json())
    sample = ("sample", "causal-lm", "--checkpoint", str(trained), "--prompt", "a")
    assert "must have as many tokens as the model, 11, got 3" in mistake(capsys, *sample)


@pytest.mark.parametrize(
    "args",
    [
        ("train", "vit", "--out", ""),
        ("train", "vit", "--out="),
        ("eval", "vit", "--checkpoint", " "),
        ("info", "--model", ""),
        ("train", "causal-lm", "--data-path", ""),
    ],
)
def test_an_empty_path_is_an_error(args, capsys):
    assert "must be a path, got an empty text" in mistake(capsys, *args)


@pytest.mark.parametrize("option", ["--lr", "--clip", "--weight-decay", "--warmup"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_numbers_of_a_run_are_finite(option, value, capsys):
    assert "finite" in mistake(capsys, "train", "vit", option, value)


def test_rounds_are_positive(capsys):
    assert "--rounds must be positive, got 0" in mistake(capsys, "bench", "--rounds", "0")


@pytest.mark.parametrize("what", ["ops", "step"])
def test_results_of_a_benchmark_are_overwritten_only_if_asked(what, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0))
    bench = ("bench", "--what", what, "--out", str(tmp_path))
    assert main(bench) == 0
    (tmp_path / f"{what}-cuda.json").touch()
    assert main(bench) == 0  # that of another device
    (tmp_path / f"{what}-cpu.json").touch()
    assert f"with {what}-cpu.json; use another name" in mistake(capsys, *bench)
    assert main([*bench, "--overwrite"]) == 0


def test_an_interrupt_ends_a_command_in_one_line(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_parse", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "dblocks: interrupted\n"


@pytest.mark.parametrize("more", [(), ("--checkpoint", "runs/vit")])
def test_a_network_that_does_not_generate_is_told_in_one_line(more, capsys):
    error = mistake(capsys, "sample", "vit", *more)
    assert "`dblocks sample` supports causal-lm, masked-lm, recurrent, dit, got vit" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "near"),
    [
        (("train", "vit", "--bacth-size", "4"), "train vit`; nearest are --batch-size, --p"),
        (("train", "dit", "--bacth_size=4"), "train dit`; nearest are --batch-size"),
        (("eval", "causal-lm", "--chekpoint", "x"), "eval causal-lm`; nearest are --checkpoint"),
        (("plan", "vit", "--memmory", "4GiB"), "plan`; nearest are --memory"),
        (("info", "--modle", "x"), "info`; nearest are --model"),
        (("train", "vit", "--context", "4"), "train vit`; "),
        (("train", "vit", "--learning-rate", "1"), "train vit`; nearest are --lr;"),
        (("train", "dit", "--max_steps=4"), "train dit`; nearest are --steps;"),
        (("eval", "vit", "--model-path", "x"), "eval vit`; nearest are --checkpoint;"),
    ],
)
def test_an_unknown_flag_is_told_those_of_the_network(argv, near, capsys):
    error = mistake(capsys, *argv)
    assert f"{argv[2].partition('=')[0] if argv[0] != 'info' else '--modle'} must be" in error
    assert f"must be a flag of `dblocks {near}" in error
    assert "--help` shows all\n" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ("train", "vit"),
        ("train", "vit", "--recipe", "paper"),  # where a switch is on, and its flag is --no-bf16
        ("eval", "dit"),
        ("merge",),
        ("plan", "vit"),
    ],
)
def test_every_flag_of_the_help_is_known(words, capsys):
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    flags = re.findall(r"^[ │]*(--[a-z][a-z0-9-]+)", capsys.readouterr().out, re.MULTILINE)
    flags = [flag for flag in flags if flag not in (*words, "--published")]  # which change others
    assert len(flags) >= 2 or words == ("merge",)
    assert ("--no-bf16" in flags) == ("paper" in words)
    with pytest.raises(SystemExit):
        main([*words, *flags, "--help"])  # refused neither with _ nor with -
    with pytest.raises(SystemExit):
        main([*words, *(f"--{flag[2:].replace('-', '_')}" for flag in flags), "--help"])


def test_a_network_of_another_command_is_told_its_own(tmp_path, capsys):
    save_model(tmp_path, tiny_vit())
    for words in (("eval", "dit"), ("sample", "dit"), ("eval", "causal-lm")):
        error = mistake(capsys, *words, "--checkpoint", str(tmp_path))
        assert f"got a ViT: use `dblocks eval vit --checkpoint {tmp_path}`" in error


@pytest.mark.parametrize(
    "flags",
    [("--device", "moon"), ("--device", "cuda:99"), ("--device", "meta"), ("--warmup", "2")],
)
def test_a_device_that_is_not_here_and_a_long_warm_up_are_named(capsys, story, tmp_path, flags):
    out = tmp_path / "new"
    error = mistake(capsys, *TEXT, "--data", story, "--steps", "1", "--out", str(out), *flags)
    assert f"{flags[0]} must be" in error
    assert flags[1] in error
    assert len(error.splitlines()) == 1
    assert not (out / "model.safetensors").exists()


def test_a_mistake_leaves_no_folder(tmp_path, capsys):
    for flags in (("--heads", "3"), ("--data", str(tmp_path / "none"))):
        args = ("train", "vit", *SIZES, *flags)
        mistake(capsys, *args, "--out", str(tmp_path / "new" / "out"))
        assert not (tmp_path / "new").exists()
        mistake(capsys, *args, "--block", "0", "--out", str(tmp_path / "new"))
        assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    mistake(capsys, *args, "--out", str(tmp_path / "old"))
    assert (tmp_path / "old").exists()


def test_windows_hold_whole_blocks_of_tokens(story, tmp_path, capsys):
    args = (*TEXT, "--data", story, "--tokens-per-block", "8", "--out", str(tmp_path / "out"))
    expected = "--context must be a multiple of --tokens-per-block 8, got 20; take 24"
    assert expected in mistake(capsys, *args)
    error = mistake(capsys, *TEXT, "--data", story, "--tokens-per-block", "0")
    assert "--tokens-per-block must be a positive integer, got 0" in error


def test_a_tokenizer_in_the_folder_is_not_replaced(story, tmp_path, capsys):
    (tmp_path / "tokenizer.json").write_text("mine")
    error = mistake(capsys, *TEXT, "--data", story, "--steps", "1", "--out", str(tmp_path))
    assert "tokenizer.json" in error
    assert (tmp_path / "tokenizer.json").read_text() == "mine"
