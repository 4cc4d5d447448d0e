import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dblocks import functional, info
from dblocks.__main__ import main
from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.checkpoint import save_model
from dblocks.models import ViT, ViTConfig
from dblocks.recipes import causal_lm, dit, masked_lm, records, recurrent, vit
from dblocks.recipes.command import Recipe
from dblocks.recipes.data import digits
from dblocks.recipes.metrics.classifier import Classifier

pytestmark = pytest.mark.usefixtures("one_thread")


def stdout(capsys, *argv):
    assert main(argv) == 0
    return capsys.readouterr().out


def run_help(capsys, *argv):
    with pytest.raises(SystemExit) as exit_info:
        main([*argv, "--help"])
    assert exit_info.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_shows_the_commands_and_an_example(capsys):
    text = run_help(capsys)
    assert "{train,eval,sample,merge,plan,info,bench}" in text
    assert "dblocks train vit --data digits --blocks 3" in text


@pytest.mark.parametrize("network", ["vit", "causal-lm"])
def test_train_help_tells_a_newcomer_what_to_set(capsys, network):
    assert network in run_help(capsys, "train")
    text = run_help(capsys, "train", network)
    for flag in ("--data", "--blocks", "--end-to-end", "--steps", "--lr", "--seed", "--out"):
        assert flag in text
    for word in ("learns to denoise", "held-out", "noise", "less", "(default: 3)"):
        assert word in text


def test_flags_are_the_fields_of_a_run(capsys):
    text = run_help(capsys, "train", "dit")
    flags = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(dit.DiTRun)}
    assert {flag for flag in flags if f" {flag} " not in text} == {"--part"}
    assert "--out" in text
    assert "--recipe {small,gpu,paper}" in text
    assert "--published" not in text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("vit",), vit.ViTRun()),
        (("dit",), dit.DiTRun()),
        (("recurrent",), recurrent.RecurrentRun()),
        (("masked-lm", "--draw", "t"), masked_lm.MaskedLMRun(draw="t")),
        (("dit", "--recipe", "gpu"), dit.GPU),
        (("dit", "--recipe=gpu", "--steps", "3000"), dataclasses.replace(dit.GPU, steps=3000)),
        (("causal-lm", "--published"), causal_lm.CausalLMRun(**causal_lm.PUBLISHED)),
        (
            ("causal-lm", "--published", "--recipe", "gpu", "--rows", "single"),
            dataclasses.replace(causal_lm.GPU, **{**causal_lm.PUBLISHED, "rows": "single"}),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_recipe_sets_the_defaults_and_flags_count_before_it(monkeypatch, flags, expected):
    given = []
    monkeypatch.setattr(Recipe, "train", lambda _, run, out, **__: given.append((run, out)))
    assert main(["train", *flags, "--out", "somewhere"]) == 0
    assert given == [(expected, Path("somewhere"))]
    assert type(given[0][0]) is type(expected)


def test_the_help_of_a_recipe_shows_its_defaults(capsys):
    assert "(default: 300000)" in run_help(capsys, "train", "dit", "--recipe", "gpu")


@pytest.mark.parametrize("argv", [("train", "vit"), ("plan", "vit"), ("eval", "dit"), ("info",)])
def test_help_breaks_lines_where_the_terminal_ends_only(capsys, monkeypatch, argv):
    monkeypatch.setenv("COLUMNS", "2000")
    with pytest.raises(SystemExit):
        main([*argv, "--help"])
    about = capsys.readouterr().out.partition(" options ")[2].splitlines()[1:-1]
    texts = [line.strip("│ ") for line in about]
    assert sum("(default: " in text for text in texts) > 1
    # A flag's text ends in its default, on the line of the flag or on the one after it.
    assert [text for text in texts if re.search("[a-z,;.:]$", text)][1:] == []


@pytest.mark.parametrize("network", ["vit", "causal-lm"])
def test_eval_help(capsys, network):
    text = run_help(capsys, "eval", network)
    assert "--checkpoint" in text
    assert ("denoising steps" if network == "vit" else "Number of windows") in text


def test_sample_help(capsys):
    text = run_help(capsys, "sample", "causal-lm")
    for flag in (
        "causal-lm",
        "--prompt",
        "--temperature",
        "--top-k",
        "--top-p",
        "--steps",
        "--product",
    ):
        assert flag in text


def test_info_names_every_op_and_version(capsys):
    text = stdout(capsys, "info")
    for word in ("torch", "triton", "numpy", "python", "dblocks", "cpu", "C++"):
        assert word in text
    for op in ("adaln", "residual_adaln", "gated_residual", "noise_inject", "edm_denoise",
               "edm_loss", "euler_step"):  # fmt: skip
        assert f"\n  {op} " in text


@pytest.mark.parametrize("flags", [("--blocks", "3"), ("--end-to-end",)])
def test_train_writes_what_eval_reads(tmp_path, capsys, flags):
    out = tmp_path / "run"
    args = ("train", "vit", "--data", "digits", "--steps", "10", "--lr", "1e-3", "--seed", "1")
    table = stdout(capsys, *args, *flags, "--batch-size", "16", "--out", str(out))
    assert "held-out accuracy" in table
    files = {p.name for p in out.iterdir()}
    assert files == {"model.safetensors", "config.json", "run.json"}
    record = json.loads((out / "run.json").read_text())
    assert record["run"]["seed"] == 1
    text = stdout(capsys, "eval", "vit", "--checkpoint", str(out))
    assert f"held-out accuracy {100 * record['accuracy']:.1f} % on 539 images" in text


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A file of some text."""
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("".join(f"{i} is followed by {i + 1}. " for i in range(100)))
    return path


@pytest.mark.parametrize(
    "flags",
    [
        ("--blocks", "3"),
        ("--blocks", "2", "--tokens-per-block", "4"),
        ("--published",),
        ("--end-to-end",),
    ],
    ids=" ".join,
)
def test_a_language_model_is_trained_evaluated_and_sampled(tmp_path, capsys, story, flags):
    out = tmp_path / "lm"
    sizes = ("--steps", "2", "--batch-size", "2", "--context", "20")
    args = ("train", "causal-lm", "--data", str(story), *sizes, *flags, "--out", str(out))
    assert "Bits per character" in stdout(capsys, *args)
    files = {p.name for p in out.iterdir()}
    assert files == {"model.safetensors", "config.json", "tokenizer.json", "run.json"}
    record = json.loads((out / "run.json").read_text())
    there = ("--checkpoint", str(out))
    evaluate = ("eval", "causal-lm", *there)  # on the story, as in training
    text = stdout(capsys, *evaluate)
    assert text.startswith(f"{record['bits']:.3f} bits per character on ")
    in_blocks = "--end-to-end" not in flags
    assert (", trained end to end\n" in text) != in_blocks
    assert ("denoising bound" in text) == in_blocks
    assert ("product of all blocks" in text) == (in_blocks and "--published" not in flags)
    if "product_bits" in record:
        assert f"{record['product_bits']:.3f} bits per character, the product" in text
    assert text == stdout(capsys, *evaluate, "--data", str(story))
    assert text != stdout(capsys, *evaluate, "--windows", "2")
    sample = ("sample", "causal-lm", *there, "--prompt", "12 is", "--tokens", "10")
    first, again = stdout(capsys, *sample), stdout(capsys, *sample)
    assert first == again
    assert first.startswith("12 is")
    assert len(first) == len("12 is") + 10 + 1
    assert first != stdout(capsys, *sample, "--seed", "1")
    assert main([*sample[:-3], "12 Ẑ", *sample[-2:]]) == 0
    assert "'Ẑ' of --prompt did not occur in the training text" in capsys.readouterr().err
    assert len(stdout(capsys, *sample[:-2])) == 20 + 1  # by default as many as fit
    if not in_blocks:
        assert "was trained end to end: leave --product" in mistake(capsys, *sample, "--product")
    elif "--published" in flags:
        assert "top_share" in mistake(capsys, *sample, "--product")
    else:
        assert first == stdout(capsys, *sample, "--product")
        cold = (*sample, "--product", "--temperature", "0")
        assert stdout(capsys, *cold) == stdout(capsys, *cold, "--seed", "1")
        assert "--steps must be left out" in mistake(capsys, *sample, "--product", "--steps", "2")
    assert "must fit in the context of 20 tokens" in mistake(capsys, *sample[:-1], "20")
    assert "must hold a ViT, got a CausalLM" in mistake(capsys, "eval", "vit", *there)
    assert "--steps must be positive" in mistake(capsys, *sample, "--steps", "0")
    assert "at least one token" in mistake(capsys, "sample", "causal-lm", *there, "--prompt", "")
    (out / "tokenizer.json").unlink()
    assert "must hold a tokenizer.json" in mistake(capsys, *sample)


CONFIG = BlocksConfig(num_blocks=3)
SIZES = {"image_size": 8, "channels": 1, "patch_size": 4, "width": 12, "depth": 3, "heads": 2}


@pytest.fixture
def checkpoint(tmp_path):
    """A network whose answers depend on the noise that denoising starts from; its folder."""
    torch.manual_seed(1)
    vit = ViT(ViTConfig(**SIZES, noise_scale=1.0))
    torch.nn.init.normal_(vit.classifier.weight)
    save_model(tmp_path / "saved", DiffusionBlocks(vit, CONFIG))
    return vit, tmp_path / "saved"


def test_eval_measures_as_training_does(checkpoint, capsys):
    vit, folder = checkpoint
    classifier = Classifier(vit, DiffusionBlocks(vit, CONFIG))
    _, held_out = digits.digits("final")
    # As in `dblocks.recipes.records.train`: the product, without noise.
    measured, noisy, other = (
        f"{100 * classifier.accuracy(held_out, **k):.1f} %"
        for k in ({}, {"num_steps": 3, "noise": "paper"},
                  {"num_steps": 3, "noise": "paper", "seed": 0})
    )  # fmt: skip
    assert len({measured, noisy, other}) == 3
    evaluate = ("eval", "vit", "--data", "digits", "--checkpoint", str(folder))
    text = stdout(capsys, *evaluate)
    assert f"accuracy {measured} on" in text
    assert "the product of 3 blocks" in text
    steps = ("--steps", "3", "--noise", "paper")
    text = stdout(capsys, *evaluate, *steps)
    assert f"accuracy {noisy} on" in text
    assert "3 denoising steps" in text
    assert f"accuracy {other} on" in stdout(capsys, *evaluate, *steps, "--seed", "0")
    unit = 100 * classifier.accuracy(held_out, 3, noise="unit_variance")
    text = stdout(capsys, *evaluate, "--steps", "3", "--noise", "unit_variance")
    assert f"accuracy {unit:.1f} %" in text


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_warning_is_one_line(checkpoint, capsys):
    there = ["--data", "digits", "--checkpoint", str(checkpoint[1])]
    assert main(["eval", "vit", *there, "--steps", "1"]) == 0
    error = capsys.readouterr().err
    assert error.startswith("dblocks: warning: ")
    assert "blocks [1, 2]" in error
    assert error.count("\n") == 1


def test_steps_of_a_network_trained_end_to_end_are_a_mistake(tmp_path, capsys):
    save_model(tmp_path, ViT(ViTConfig(**SIZES, conditioning="none")))
    args = ("eval", "vit", "--checkpoint", str(tmp_path))
    assert "was trained end to end" in mistake(capsys, *args, "--steps", "3")
    assert "all layers once" in stdout(capsys, *args, "--data", "digits")
    assert "--data must name the data, as" in mistake(capsys, *args)


def test_a_folder_that_cannot_be_written_to_is_found_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "train", None)
    (tmp_path / "file").touch()
    args = ("train", "vit", "--out", str(tmp_path / "file"))
    assert "file must be a folder to write files in" in mistake(capsys, *args)


def test_a_broken_checkpoint_is_one_line(checkpoint, capsys):
    (checkpoint[1] / "model.safetensors").write_bytes(b"")
    args = ("eval", "vit", "--checkpoint", str(checkpoint[1]))
    assert "model.safetensors cannot be used" in mistake(capsys, *args)


def test_info_lists_the_public_ops():
    assert {*info.OPS} == {name for name in functional.__all__ if name.islower()}
    assert "adaln" in info.OPS


def test_a_record_names_the_device_that_the_recipe_computes_on():
    assert info.environment()["device"] == "cpu"
    with torch.device("meta"):
        assert info.environment()["device"] == "meta"


def mistake(capsys, *argv):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_mistakes_are_one_line(tmp_path, capsys):
    empty = ("eval", "vit", "--checkpoint", str(tmp_path))
    assert "must hold a config.json" in mistake(capsys, *empty)
    assert "number of layers, 12, got 13" in mistake(capsys, "train", "vit", "--blocks", "13")
    for lr in ("inf", "nan", "0"):
        assert "lr must be positive and finite" in mistake(capsys, "train", "vit", "--lr", lr)
    for seed in (10**20, 2**63, -1):
        message = f"seed must be at least 0 and less than 2**63, got {seed}"
        assert message in mistake(capsys, "train", "vit", "--seed", str(seed))
        assert message in mistake(capsys, *empty, "--seed", str(seed))
    assert "--batch-size must be at most the number of training images" in mistake(
        capsys, "train", "vit", "--batch-size", "2000", "--out", str(tmp_path)
    )


def test_without_tyro_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert "dblocks[train]" in mistake(capsys, "info")


def test_without_scikit_learn_the_extra_is_named(tmp_path, monkeypatch, capsys):
    out = ("--out", str(tmp_path))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "dblocks[eval]" in mistake(capsys, "train", "vit", "--steps", "1", *out)


def test_without_safetensors_nothing_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setattr(records, "train", None)
    error = mistake(capsys, "train", "vit", "--out", str(tmp_path))
    assert "safetensors, which is not installed" in error


MODULES = """__main__ checkpoint info recipes.data.images recipes.data.text recipes.metrics.images
recipes.image_grid recipes.records recipes.tables recipes.vit recipes.causal_lm"""
OPTIONAL = "tyro sklearn matplotlib safetensors"  # torch itself may import tqdm


def test_importing_the_modules_imports_nothing_optional():
    code = (
        "import importlib, sys\n"
        f"for name in {MODULES.split()!r}: importlib.import_module('dblocks.' + name)\n"
        f"print(sorted(set({OPTIONAL.split()!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_python_m_dblocks_is_the_command():
    command = [sys.executable, "-m", "dblocks", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "usage: dblocks" in done.stdout


def ran(monkeypatch, returncode=0):
    commands = []

    def run(command, **options):
        commands.append(command[1:])
        return subprocess.CompletedProcess(command, returncode)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_bench_runs_the_benchmark_of_the_checkout(monkeypatch, tmp_path):
    commands = ran(monkeypatch)
    out = str(tmp_path / "out")
    assert main(["bench", "--op", "adaln", "euler_step", "--rounds", "3", "--out", out]) == 0
    assert main(["bench", "--what", "step", "--device", "cuda"]) == 0
    ops = ["-m", "benchmarks.ops.run", "--device", "cpu", "--rounds", "3", "--out", out]
    assert commands == [
        [*ops, "--op", "adaln", "--op", "euler_step"],
        ["-m", "benchmarks.models.step", "--device", "cuda", "--rounds", "10"],
    ]


def test_bench_says_what_is_wrong(monkeypatch, capsys, tmp_path):
    commands = ran(monkeypatch, returncode=1)
    assert main(["bench", "--what", "step", "--op", "adaln"]) == 2
    assert "--op, --memory and --compare need `--what ops`" in capsys.readouterr().err
    assert not commands
    assert main(["bench"]) == 2
    assert "ended with exit code 1" in capsys.readouterr().err
    monkeypatch.setattr("dblocks.__main__.__file__", str(tmp_path / "dblocks" / "__main__.py"))
    assert main(["bench"]) == 2
    assert "runs from a checkout" in capsys.readouterr().err


def test_a_reader_that_closes_the_pipe_is_no_error():
    command = f"{sys.executable} -m dblocks info | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stderr == ""
