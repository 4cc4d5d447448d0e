"""The command line: `dblocks train|eval|sample|info|bench`, also `python -m dblocks`."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from dblocks.recipes.commands import causal_lm, dit, masked_lm, recurrent, vit

DESCRIPTION = """DiffusionBlocks: train a residual network one block of layers at a time.

Try: dblocks train vit --data digits --blocks 3 --out runs/vit"""


@dataclass(frozen=True, kw_only=True)
class Info:
    """Print versions, devices, and which implementation each fused op would use here and why.

    With --model: what dblocks would do with a model of another library, found out from its config
    alone. Its residual layers, the blocks that they would be cut into and the memory that training
    one of them would take, and the modules that the fused ops would replace.
    """

    model: str | None = None
    """A model of transformers, diffusers or timm: a folder with its config.json, or that file;
    a model type of transformers, such as llama, with default sizes; or a name of timm, such as
    timm:vit_small_patch16_224. No weights are downloaded or allocated."""
    blocks: int = 3
    """Number of blocks, with --model."""

    def __call__(self) -> None:
        """Print the report."""
        if self.model is not None:
            from dblocks.integrations import describe

            print(describe.report(self.model, self.blocks))
            return
        from dblocks.info import report

        print(report())


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

    def __call__(self) -> None:
        """Run the benchmark in a process of its own, with the allocator's settings it needs."""
        root = Path(__file__).resolve().parents[1]
        if not (root / "benchmarks" / "ops" / "run.py").exists():
            raise ValueError(
                "dblocks bench runs from a checkout, where the folder benchmarks/ is; this dblocks "
                f"is installed in {root}. Clone the repository and run `make bench` there"
            )
        arguments = [f"benchmarks.{'ops.run' if self.what == 'ops' else 'models.step'}"]
        arguments += ["--device", self.device, "--rounds", str(self.rounds)]
        if self.out is not None:
            arguments += ["--out", str(self.out.resolve())]
        if self.what == "ops":
            arguments += [word for name in self.op for word in ("--op", name)]
            arguments += ["--memory"] if self.memory else []
            if self.compare is not None:
                arguments += ["--compare", str(self.compare.resolve())]
        elif self.op or self.memory or self.compare is not None:
            raise ValueError("--op, --memory and --compare are of `--what ops`; leave them out")
        done = subprocess.run([sys.executable, "-m", *arguments], cwd=root, check=False)
        if done.returncode:
            raise ValueError(f"the benchmark ended with exit code {done.returncode}; see above")


NETWORKS = {  # by verb and network
    "train": (
        "Train a network.",
        {
            "vit": vit.Train,
            "causal-lm": causal_lm.Train,
            "masked-lm": masked_lm.Train,
            "recurrent": recurrent.Train,
            "dit": dit.Train,
        },
    ),
    "eval": (
        "Measure a trained network.",
        {
            "vit": vit.Eval,
            "causal-lm": causal_lm.Eval,
            "masked-lm": masked_lm.Eval,
            "recurrent": recurrent.Eval,
            "dit": dit.Eval,
        },
    ),
    "sample": (
        "Let a trained network generate.",
        {
            "causal-lm": causal_lm.Sample,
            "masked-lm": masked_lm.Sample,
            "recurrent": recurrent.Sample,
            "dit": dit.Sample,
        },
    ),
}
COMMANDS = {"info": Info, "bench": Bench}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a user's mistake is one line on stderr and the exit code 2."""
    try:
        command = _parse(sys.argv[1:] if argv is None else argv)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            command()
    except (ImportError, ValueError, OSError) as error:
        print(f"dblocks: error: {error}", file=sys.stderr)
        return 2
    return 0


def _show_warning(message: Warning | str, *_: Any) -> None:
    """One line, without the path and the source line that Python prints."""
    print(f"dblocks: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _parse(argv: Sequence[str]) -> Callable[[], None]:
    tyro = _tyro()
    verbs = {name: _verb(tyro, name, *parts) for name, parts in NETWORKS.items()}
    parsed = tyro.extras.subcommand_cli_from_dict(
        {**verbs, **COMMANDS},
        prog="dblocks",
        description=DESCRIPTION,
        args=list(argv),
        config=(
            tyro.conf.FlagCreatePairsOff,
            tyro.conf.OmitSubcommandPrefixes,
            tyro.conf.OmitArgPrefixes,
        ),
    )
    return getattr(parsed, "network", parsed)


def _verb(tyro: Any, name: str, description: str, networks: Mapping[str, type]) -> type:
    """A command whose one field is the command of a network, as tyro wants subcommands."""
    options = tuple(
        Annotated[command, tyro.conf.subcommand(name=network)]
        for network, command in networks.items()
    )
    made = make_dataclass(name, [("network", Union[options])], frozen=True)  # noqa: UP007
    made.__doc__ = description
    return made


def _tyro() -> Any:
    try:
        return importlib.import_module("tyro")
    except ImportError as error:
        raise ImportError(
            "the command line needs the package tyro, which is not installed; "
            "`pip install 'dblocks[train]'`"
        ) from error
