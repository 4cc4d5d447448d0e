"""The command line: `dblocks train|eval|info|bench`, also `python -m dblocks`."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from dblocks.recipes._base import check_seed
from dblocks.recipes.vit import NOISE_SEED

DESCRIPTION = """DiffusionBlocks: train a residual network one block of layers at a time.

Try: dblocks train vit --data digits --blocks 3 --out runs/vit"""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a 12-layer vision transformer, block by block or end to end, and save it.

    Block by block, the layers are split into equal runs ("blocks"). Each block learns to denoise
    the label's embedding within its own range of noise levels, so that a training step runs, and
    keeps in memory, one block only. Prints the accuracy on held-out data and what it cost; writes
    model.safetensors, config.json and run.json into --out.
    """

    model: Literal["vit"]
    """Which network to train: vit, a vision transformer for classifying images."""
    data: Literal["digits"] = "digits"
    """What to train on: digits, the 1,797 8x8 digits of scikit-learn; 30 % are held out."""
    blocks: int = 3
    """Blocks that the 12 layers are split into: more blocks, less memory, shorter steps."""
    end_to_end: bool = False
    """Train all layers together instead, the usual way, to compare with."""
    steps: int = 4500
    """Training steps of one batch each; a step trains one block, drawn at random."""
    lr: float = 1e-3
    """Peak learning rate of AdamW: a short warm-up leads to it, a cosine from it to 0."""
    batch_size: int = 128
    """Images in a batch."""
    seed: int = 0
    """Of weights, order of the data and noise; the held-out images are always the same."""
    out: Path = Path("runs/vit")
    """Folder to write to; it is made if it is not there."""


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure the accuracy of a saved model on held-out data."""

    model: Literal["vit"]
    """Which network was trained."""
    data: Literal["digits"] = "digits"
    """What to evaluate on: the held-out part of this data."""
    checkpoint: Path = Path("runs/vit")
    """Folder that `dblocks train` wrote."""
    steps: int | None = None
    """Denoising steps from noise to a label, one block each; by default, one for each block."""
    seed: int = NOISE_SEED
    """Of the noise that denoising starts from; by default that of training's own measurement."""


@dataclass(frozen=True, kw_only=True)
class Info:
    """Print versions, devices, and which implementation each fused op would use here and why."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Time every fused op, or whole training steps, beside PyTorch and its compiler.

    Runs from a checkout, where the folder benchmarks/ is. Results are checked before they are
    timed; all of it takes about half an hour on 2 cores.
    """

    what: Literal["ops", "step"] = "ops"
    """ops: each op by itself. step: one training step of a ViT, of a block and end to end."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    op: tuple[str, ...] = ()
    """Only these ops, such as adaln noise_inject."""
    rounds: int = 10
    """How often each peer takes its turn."""
    memory: bool = False
    """Measure peak memory too, each peer in a process of its own."""
    out: Path | None = None
    """Folder for the JSON, the tables and the charts."""
    compare: Path | None = None
    """An earlier JSON: also print what changed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a user's mistake is one line on stderr and the exit code 2."""
    try:
        command = _parse(sys.argv[1:] if argv is None else argv)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            {Train: train, Eval: evaluate, Info: info, Bench: bench}[type(command)](command)
    except (ImportError, ValueError, OSError) as error:
        print(f"dblocks: error: {error}", file=sys.stderr)
        return 2
    return 0


def _show_warning(message: Warning | str, *_: Any) -> None:
    """One line, without the path and the source line that Python prints."""
    print(f"dblocks: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _parse(argv: Sequence[str]) -> Train | Eval | Info | Bench:
    tyro = _tyro()
    commands = {"train": Train, "eval": Eval, "info": Info, "bench": Bench}
    return tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="dblocks",
        description=DESCRIPTION,
        args=list(argv),
        # Fields without a default are positional: `dblocks train vit`.
        config=(tyro.conf.PositionalRequiredArgs, tyro.conf.FlagCreatePairsOff),
    )


def _tyro() -> Any:
    try:
        return importlib.import_module("tyro")
    except ImportError as error:
        raise ImportError(
            "the command line needs the package tyro, which is not installed; "
            "`pip install 'dblocks[train]'`"
        ) from error


def train(command: Train) -> None:
    """Train, save, and print the table of what it cost and reached."""
    from dblocks import checkpoint, records, report
    from dblocks.experiments import vit as experiment
    from dblocks.recipes.vit import ViTRun

    run = ViTRun(
        blocks=command.blocks,
        end_to_end=command.end_to_end,
        steps=command.steps,
        lr=command.lr,
        batch_size=command.batch_size,
        seed=command.seed,
    )
    checkpoint.prepare(command.out)
    records.use_one_thread()
    trained = records.train(run, progress=True)
    checkpoint.save_model(command.out, trained.learner.trained)
    records.write_record(command.out / "run.json", trained.record)
    print(report.text_table({run.name: [trained.record]}, experiment.COLUMNS))
    print(f"\nSaved model.safetensors, config.json and run.json in {command.out}")


def evaluate(command: Eval) -> None:
    """Load, classify the held-out part, and print the accuracy."""
    from dblocks import blocks, checkpoint, data
    from dblocks.recipes.vit import Classifier

    if command.steps is not None and command.steps < 1:
        raise ValueError(f"--steps must be positive, got {command.steps}")
    check_seed(command.seed)
    model = checkpoint.load_model(command.checkpoint)
    _, held_out = data.digits("final")
    if isinstance(model, blocks.DiffusionBlocks):
        classifier = Classifier(cast(Any, model.base_model), model)
        how = f"{command.steps or model.config.num_blocks} denoising steps of one block each"
    elif command.steps is not None:
        raise ValueError(
            f"--steps counts denoising steps, and the network in {command.checkpoint} was trained "
            "end to end: it runs all its layers once; leave --steps out"
        )
    else:
        classifier, how = Classifier(model, None), "all layers once (trained end to end)"
    value = classifier.accuracy(held_out, command.steps, seed=command.seed)
    print(f"held-out accuracy {100 * value:.1f} % on {len(held_out)} images, {how}")


def info(command: Info) -> None:
    """Print the report."""
    from dblocks.info import report

    print(report())


def bench(command: Bench) -> None:
    """Run the benchmark in a process of its own, with the allocator's settings that it needs."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / "run.py").exists():
        raise ValueError(
            "dblocks bench runs from a checkout, where the folder benchmarks/ is; this dblocks is "
            f"installed in {root}. Clone the repository and run `make bench` there"
        )
    arguments = [f"benchmarks.{'run' if command.what == 'ops' else 'step'}"]
    arguments += ["--device", command.device, "--rounds", str(command.rounds)]
    if command.out is not None:
        arguments += ["--out", str(command.out.resolve())]
    if command.what == "ops":
        arguments += [word for name in command.op for word in ("--op", name)]
        arguments += ["--memory"] if command.memory else []
        if command.compare is not None:
            arguments += ["--compare", str(command.compare.resolve())]
    elif command.op or command.memory or command.compare is not None:
        raise ValueError("--op, --memory and --compare are of `--what ops`; leave them out")
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=root, check=False)
    if done.returncode:
        raise ValueError(f"the benchmark ended with exit code {done.returncode}; see above")
