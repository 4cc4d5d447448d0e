import json

import pytest

from dblocks.__main__ import main
from dblocks.recipes import recurrent

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def story(tmp_path, monkeypatch):
    """A file of some text, and few steps to measure."""
    monkeypatch.setattr(recurrent, "STEPS", (1, 2))
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


@pytest.mark.parametrize("flags", [(), ("--end-to-end",)])
def test_a_recurrent_model_is_trained_evaluated_and_sampled(tmp_path, capsys, story, flags):
    out = tmp_path / "recurrent"
    sizes = ("--steps", "2", "--batch-size", "2", "--context", "20")
    args = ("train", "recurrent", "--data", str(story), *sizes, *flags, "--out", str(out))
    assert "Bits per character" in stdout(capsys, *args)
    files = {p.name for p in out.iterdir()}
    assert files == {"model.safetensors", "config.json", "tokenizer.json", "run.json"}
    record = json.loads((out / "run.json").read_text())
    there = ("--checkpoint", str(out))
    evaluate = ("eval", "recurrent", "--data", str(story), *there)
    text = stdout(capsys, *evaluate)
    assert text.startswith(f"{record['bits']:.3f} bits per character on ")
    assert (", 32 recurrences\n" in text) == bool(flags)
    assert ("one call of the block" in text) == ("denoising bound" in text) == (not flags)
    if flags:
        assert stdout(capsys, *evaluate, "--steps", "3").endswith(", 3 recurrences\n")
    else:
        assert "--steps is the number of recurrences" in mistake(capsys, *evaluate, "--steps", "3")
    sample = ("sample", "recurrent", *there, "--prompt", "12 is", "--tokens", "10", "--steps", "8")
    first, again = stdout(capsys, *sample), stdout(capsys, *sample)
    assert first == again
    assert first.startswith("12 is")
    assert len(first) == len("12 is") + 10 + 1
    assert first != stdout(capsys, *sample, "--seed", "1")
    assert "--steps must be positive, got 0" in mistake(capsys, *evaluate, "--steps", "0")
    assert "--steps must be positive, got 0" in mistake(capsys, *sample[:-1], "0")
    assert "windows must be positive" in mistake(capsys, *evaluate, "--windows", "0")
    assert "must hold a CausalLM, got a RecurrentLM" in mistake(capsys, "eval", "causal-lm", *there)


@pytest.mark.parametrize("verb", ["train", "eval", "sample"])
def test_help_tells_a_newcomer_what_the_steps_are(capsys, verb):
    with pytest.raises(SystemExit) as exit_info:
        main((verb, "recurrent", "--help"))
    assert exit_info.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    words = (
        ("learns to denoise", "applies it about 32 times")
        if verb == "train"
        else ("recurrences", "step")
    )
    assert all(word in text for word in words)
