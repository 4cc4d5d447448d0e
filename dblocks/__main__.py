"""The command line: `dblocks train|eval|sample|merge|plan|info|bench`, also `python -m dblocks`."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_type_hints

from dblocks.scale import Interrupted
from dblocks.scale.signals import Terminated, terminable

if TYPE_CHECKING:
    from dblocks.recipes.command import Recipe

DESCRIPTION = """DiffusionBlocks: train a residual network one block of layers at a time.

Try: dblocks train vit --data digits --blocks 3 --out runs/vit"""


@dataclass(frozen=True, kw_only=True)
class Info:
    """Print versions, devices, and which implementation each fused op would use here and why.

    With --model, describe what dblocks would do with a model of another library, from its config
    alone: its residual layers, their division into blocks, the memory of training one block, and
    the modules that the fused ops would replace.
    """

    model: str | None = None
    """A model of transformers, diffusers or timm: a folder with its config.json, or that file;
    a model type of transformers, such as llama, with default sizes; or a name of timm, such as
    timm:vit_small_patch16_224. No weights are downloaded or allocated."""
    blocks: int = 3
    """Number of blocks; only with --model."""

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
    """Time every fused op, or whole training steps, against PyTorch and its compiler.

    Runs from a checkout, which has the folder benchmarks/. Results are checked before they are
    timed; everything takes about half an hour on 2 cores.
    """

    what: Literal["ops", "step"] = "ops"
    """ops: each op by itself. step: a training step of a ViT, in blocks and end to end."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    op: tuple[str, ...] = ()
    """Ops to time, such as adaln noise_inject; all by default."""
    rounds: int = 10
    """Number of interleaved rounds."""
    memory: bool = False
    """Also measure peak memory, each implementation in a separate process."""
    out: Path | None = None
    """Folder for the JSON, the tables and the charts."""
    overwrite: bool = False
    """Replace existing results in --out."""
    compare: Path | None = None
    """An earlier JSON to compare with; prints the changes."""

    def __call__(self) -> None:
        """Run the benchmark in a separate process, with the allocator settings that it needs."""
        if self.rounds < 1:
            raise ValueError(f"--rounds must be positive, got {self.rounds}")
        root = Path(__file__).resolve().parents[1]
        if not (root / "benchmarks" / "ops" / "run.py").exists():
            raise ValueError(
                "dblocks bench runs from a checkout, where the folder benchmarks/ is; this dblocks "
                f"is installed in {root}. Clone the repository and run `make bench` there"
            )
        arguments = [f"benchmarks.{'ops.run' if self.what == 'ops' else 'models.step'}"]
        arguments += ["--device", self.device, "--rounds", str(self.rounds)]
        if self.out is not None:
            from dblocks.recipes.command import check_free

            record = self.out / f"{self.what}-{self.device}.json"
            check_free(self.out, [record], overwrite=self.overwrite)
            arguments += ["--out", str(self.out.resolve())]
        if self.what == "ops":
            arguments += [word for name in self.op for word in ("--op", name)]
            arguments += ["--memory"] if self.memory else []
            if self.compare is not None:
                arguments += ["--compare", str(self.compare.resolve())]
        elif self.op or self.memory or self.compare is not None:
            raise ValueError("--op, --memory and --compare need `--what ops`; leave them out")
        done = subprocess.run([sys.executable, "-m", *arguments], cwd=root, check=False)
        if done.returncode:
            raise ValueError(f"the benchmark ended with exit code {done.returncode}; see above")


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Merge blocks from `dblocks train ... --block N` into one network."""

    out: Path
    """Folder to write the network to; it may be the folder of the blocks."""
    folders: tuple[Path, ...]
    """The folders of the blocks, or the folder that contains them."""
    overwrite: bool = False
    """Replace an existing network in OUT."""

    def __call__(self) -> None:
        """Check that the blocks belong to one network, and write it."""
        from dblocks.recipes.command import check_free, name_of, saved_files, saved_line
        from dblocks.scale import merge_blocks

        check_free(self.out, saved_files(self.out), overwrite=self.overwrite, name="OUT")
        merge_blocks(self.out, self.folders)
        print(saved_line(self.out))
        from dblocks.config import read_json
        from dblocks.recipes.merged import eval_command

        name = name_of(self.out)
        settings = read_json(self.out / "run.json")["merged"][0].get("run", {})
        defaults = _networks()[name].RECIPE.run
        print(f"Measure it: {eval_command(self.out, settings, defaults)}")


COMMANDS = {"info": Info, "bench": Bench}
VERBS = {
    "train": "Train a network.",
    "eval": "Measure a trained network.",
    "sample": "Let a trained network generate.",
}
# Names of flags in other programs.
ALSO_CALLED = {"--learning-rate": "--lr", "--num-blocks": "--blocks", "--num-steps": "--steps"}
ALSO_CALLED |= {"--max-steps": "--steps", "--iterations": "--steps", "--output-dir": "--out"}
ALSO_CALLED |= {"--output": "--out", "--model-path": "--checkpoint", "--num-layers": "--depth"}
ALSO_CALLED |= {
    "--warmup-steps": "--warmup",
    "--warmup-ratio": "--warmup",
    "--wd": "--weight-decay",
}
ALSO_CALLED |= {"--batch": "--batch-size", "--ema-decay": "--ema", "--fp16": "--bf16"}
PATH_FLAGS = ("--out", "--checkpoint", "--compare", "--data", "--tokenizer", "--model")
PATH_FLAGS += ("--json", "--chart", "--tensorboard", "--data-path")
INTERRUPTED = 130  # the shell's exit code of a program ended by Ctrl-C
BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a user's mistake prints one line on stderr and exits with code 2."""
    try:
        with terminable():
            return _run(argv)
    except Terminated as end:
        print("dblocks: interrupted by SIGTERM", file=sys.stderr)
        return end.code


def _run(argv: Sequence[str] | None) -> int:
    try:
        argv = sys.argv[1:] if argv is None else argv
        _check_paths(argv)
        command = _parse(argv)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            command()
            sys.stdout.flush()
    except BrokenPipeError:  # the reader closed the pipe, as in `dblocks info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (ImportError, ValueError, OSError, FloatingPointError) as error:
        print(f"dblocks: error: {error}", file=sys.stderr)
        return 2
    except Interrupted as error:
        if str(error):  # one of several processes prints it
            print(f"dblocks: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("dblocks: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _check_paths(argv: Sequence[str]) -> None:
    """Raises ValueError for an empty path, which would mean the current folder."""
    words = [word for arg in argv for word in (arg.split("=", 1) if arg[:2] == "--" else [arg])]
    for flag, value in pairwise(words):
        if flag in PATH_FLAGS and not value.strip():
            raise ValueError(
                f"{flag} must be a path, got an empty text; use . for the current folder"
            )


def _show_warning(message: Warning | str, *_: Any) -> None:
    """Prints a warning as one line, without the path and source line that Python adds."""
    print(f"dblocks: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _parse(argv: Sequence[str]) -> Callable[[], None]:
    tyro = _tyro()
    from dblocks.scale.planner import command as plan

    alone = {
        "merge": _positional(tyro, Merge, out="OUT", folders="FOLDER [FOLDER ...]"),
        "plan": plan.command(tyro, argv, _planned(argv)),
        **COMMANDS,
    }
    verbs = _verbs(tyro, argv)
    _check_flags(argv, {**alone, **verbs})
    parsed = tyro.extras.subcommand_cli_from_dict(
        {
            **{verb: _verb(tyro, verb, VERBS[verb], networks) for verb, networks in verbs.items()},
            **{name: _flowing(command) for name, command in alone.items()},
        },
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


def _networks() -> dict[str, Any]:
    """The modules of the networks' recipes."""
    from dblocks.recipes import causal_lm, dit, masked_lm, recurrent, vit

    return {
        "vit": vit,
        "causal-lm": causal_lm,
        "masked-lm": masked_lm,
        "recurrent": recurrent,
        "dit": dit,
    }


def _planned(argv: Sequence[str]) -> dict[str, Any]:
    """The defaults of the flags of `dblocks plan NETWORK --recipe paper`; empty without it."""
    found = _chosen(argv)
    networks = _networks()
    network = next((word for word in argv[1:] if word in networks), None)
    if list(argv[:1]) != ["plan"] or found.recipe != "paper" or network is None:
        return {}
    from dblocks.recipes.paper.choice import experiment_of, run_of
    from dblocks.recipes.paper.networks import plan_of

    recipe = networks[network].RECIPE
    experiment = experiment_of(recipe.paper, found.data)
    return plan_of(experiment, run_of(experiment, recipe.run))


def _check_flags(argv: Sequence[str], commands: Mapping[str, Any]) -> None:
    """Raises ValueError for a flag or a network that the chosen command does not have.

    For such a flag, the parser's own message would list flags of all networks.
    """
    if not argv or argv[0] not in commands:
        return
    words, command = [argv[0]], commands[argv[0]]
    if isinstance(command, dict):
        if len(argv) < 2 or argv[1] not in command:
            if len(argv) > 1 and argv[1] in _networks():
                raise ValueError(
                    f"`dblocks {argv[0]}` supports {', '.join(command)}, got {argv[1]}, which "
                    "generates nothing; use `dblocks eval`"
                )
            return
        words, command = list(argv[:2]), command[argv[1]]
    names = {f.name: f.name.replace("_", "-") for f in dataclasses.fields(command)}
    # A flag that is on by default is switched off by --no-...
    off = [f"--no-{flag}" for name, flag in names.items() if getattr(command, name, None) is True]
    known = ["--help", *(f"--{flag}" for flag in names.values()), *off]
    for word in argv[len(words) :]:
        flag = word.partition("=")[0].replace("_", "-")
        if not flag.startswith("--") or flag in ("--", *known):
            continue
        also = ALSO_CALLED.get(flag)
        near = [also] if also in known else difflib.get_close_matches(flag, known, n=4)
        text = f"; nearest are {', '.join(near)}" if near else ""
        path = " ".join(["dblocks", *words])
        raise ValueError(
            f"{word.partition('=')[0]} must be a flag of `{path}`{text}; `{path} --help` shows all"
        )


def _verbs(tyro: Any, argv: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The commands of the networks, by verb and network."""
    networks = _networks()
    train = {name: _training(tyro, name, module.RECIPE, argv) for name, module in networks.items()}
    evaluate = {name: module.Eval for name, module in networks.items()}
    sample = {name: module.Sample for name, module in networks.items() if hasattr(module, "Sample")}
    return {"train": train, "eval": evaluate, "sample": sample}


def _chosen(argv: Sequence[str]) -> Any:
    """The flags that determine the defaults of other flags."""
    chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--recipe", nargs="?")
    chosen.add_argument("--data", nargs="?")
    chosen.add_argument("--published", action="store_true")
    return chosen.parse_known_args(list(argv))[0]


def _training(tyro: Any, network: str, recipe: Recipe, argv: Sequence[str]) -> Any:
    """The training command of a recipe, with the defaults of its flags.

    `--recipe`, the paper's `--data` and `--published` determine the defaults of other flags, so
    they are read first.
    """
    from dblocks.recipes.train_command import train_command

    run = recipe.run
    if list(argv[:2]) == ["train", network]:
        found = _chosen(argv)
        run = recipe.defaults(found.recipe, data=found.data, published=found.published)
    return train_command(tyro, recipe, run)


def _verb(tyro: Any, name: str, description: str, networks: Mapping[str, Any]) -> type:
    """A command whose only field is the command of a network: tyro's form of subcommands.

    The command of a network is a class, or an instance that holds the defaults of the flags.
    """
    for command in networks.values():
        _flowing(command if isinstance(command, type) else type(command))
    options = tuple(
        Annotated[command, tyro.conf.subcommand(name=network)]
        if isinstance(command, type)
        else Annotated[type(command), tyro.conf.subcommand(name=network, default=command)]
        for network, command in networks.items()
    )
    made = make_dataclass(name, [("network", Union[options])], frozen=True)  # noqa: UP007
    made.__doc__ = description
    return made


def _positional(tyro: Any, command: type, **shown: str) -> type:
    """A command whose arguments with these names are positional, and how help shows them."""
    hints = get_type_hints(command)
    fields = [
        (name, Annotated[hints[name], tyro.conf.Positional, tyro.conf.arg(metavar=text)])
        for name, text in shown.items()
    ]
    made = make_dataclass(command.__name__, fields, bases=(command,), frozen=True, kw_only=True)
    made.__doc__ = command.__doc__
    return made


def _flowing(command: type) -> type:
    """`command` with the help of its flags on one line each.

    tyro joins lines only if they are not indented, but lines of a field's docstring are.
    """
    parse = importlib.import_module("docstring_parser").parse_from_object  # tyro's own
    classes = reversed(command.__mro__[:-1])
    said = {doc.arg_name: doc.description for cls in classes for doc in parse(cls).params}
    for field in dataclasses.fields(command):
        if text := said.get(field.name):
            field.metadata = MappingProxyType({**field.metadata, "help": " ".join(text.split())})
    return command


def _tyro() -> Any:
    try:
        return importlib.import_module("tyro")
    except ImportError as error:
        raise ImportError(
            "the command line needs the package tyro, which is not installed; "
            "`pip install 'dblocks[train]'`"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
