import json

import pytest

from dblocks.__main__ import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def story(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("".join(f"{i} is followed by {i + 1}. " for i in range(100)))
    return path


def stdout(capsys, *argv):
    assert main(argv) == 0
    return capsys.readouterr().out


def mistake(capsys, *argv):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("flags", [("--schedule", "cosine", "--draw", "t"), ("--end-to-end",)])
def test_a_masked_model_is_trained_evaluated_and_sampled(tmp_path, capsys, story, flags):
    out = tmp_path / "masked"
    sizes = ("--steps", "2", "--batch-size", "2", "--context", "20")
    args = ("train", "masked-lm", "--data", str(story), *sizes, *flags, "--out", str(out))
    text = stdout(capsys, *args)
    assert "Bits per character (bound)" in text
    assert "--infill" in text
    files = {p.name for p in out.iterdir()}
    assert files == {"model.safetensors", "config.json", "tokenizer.json", "run.json"}
    record = json.loads((out / "run.json").read_text())
    assert record["run"]["schedule"] == ("linear" if len(flags) == 1 else "cosine")
    there = ("--checkpoint", str(out))
    evaluate = ("eval", "masked-lm", "--data", str(story), *there, "--seed", "7")
    assert stdout(capsys, *evaluate).startswith(
        f"{record['bits']:.3f} bits per character "
        f"(bound, standard error {record['bits_error']:.3f})"
    )
    assert "bits per character" in stdout(capsys, *evaluate, "--points", "6")
    sample = ("sample", "masked-lm", *there, "--prompt", "12 is", "--tokens", "10")
    first, again = stdout(capsys, *sample), stdout(capsys, *sample)
    assert first == again
    written, calls = first.splitlines()[0], first.splitlines()[-1]
    assert written.startswith("12 is")
    assert calls.startswith("calls of each block's layers: block 0: ")
    assert calls.count("block ") == (1 if len(flags) == 1 else 3)
    assert first != stdout(capsys, *sample, "--seed", "1")
    infilled = stdout(capsys, "sample", "masked-lm", *there, "--infill", "1_ is ___lowed b_")
    assert infilled.startswith("1")
    assert infilled[2:6] == " is "
    assert infilled[9:16] == "lowed b"
    other = stdout(capsys, "sample", "masked-lm", *there, "--infill", "1_is ?lowed", "--gap", "?")
    assert other.startswith(("1_is ", "1\N{REPLACEMENT CHARACTER}is "))
    assert other.splitlines()[0].endswith("lowed")
    # As many as fit, by default.
    whole = stdout(capsys, "sample", "masked-lm", *there, "--prompt", "12 is")
    assert len(whole.split("\ncalls of each")[0]) == 20
    mistakes = {
        ("--infill", "no gap"): "--infill must have a gap, the one character of --gap",
        ("--tokens", "0"): "--tokens must be at least 1 and fit with the prompt's 2 tokens",
        ("--tokens", "30"): "into the context of 20, got 30",
        ("--prompt", ""): "--prompt must have at least one token",
        ("--tokens", "5", "--steps", "0"): "number of steps must be a positive integer, got 0",
    }
    for options, message in mistakes.items():
        argv = ("sample", "masked-lm", *there, "--prompt", "12", *options)
        assert message in mistake(capsys, *argv)
    assert "points must be a" in mistake(capsys, *evaluate, "--points", "0")
    assert "must hold a CausalLM, got a MaskedLM" in mistake(capsys, "eval", "causal-lm", *there)


@pytest.mark.parametrize("verb", ["train", "eval", "sample"])
def test_help_speaks_plainly(capsys, verb):
    with pytest.raises(SystemExit) as stop:
        main([verb, "masked-lm", "--help"])
    assert stop.value.code == 0
    assert "mask" in capsys.readouterr().out
