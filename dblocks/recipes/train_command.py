"""The command `dblocks train NETWORK`, whose flags are the fields of a run and a few more."""

from __future__ import annotations

import dataclasses
from dataclasses import make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from dblocks.recipes.command import KEEP, Recipe
from dblocks.recipes.flags import naming_flags
from dblocks.recipes.run import Run

KINDS = {
    "small": "small, for minutes on a CPU",
    "gpu": "gpu, for one large GPU",
    "paper": "paper, for the paper's experiment on --data NAME",
}
OUT = "Folder to write to; created if it does not exist."
OVERWRITE = "Replace the network in --out."
EVERY = (
    "Steps between two checkpoints, written to the folder checkpoints in --out. On Ctrl-C or "
    "SIGTERM, the run then ends with a checkpoint."
)
KEPT = "Number of checkpoints to keep; older ones are deleted."
RESUME = (
    "Continue from the newest valid checkpoint, with bitwise the same result as without an "
    "interruption; start from the beginning if there is none."
)
BOARD = "Folder for TensorBoard files of the curve; needs the package tensorboard."


def train_command(tyro: Any, recipe: Recipe, run: Run) -> Any:
    """The training command of a recipe; the fields of `run` are the defaults of its flags."""
    # Only studies choose the part of the data.
    more: list[Any] = [("part", tyro.conf.Suppress[str], run.part)]

    def add(name: str, kind: Any, text: str, default: Any) -> None:
        more.append((name, Annotated[kind, tyro.conf.arg(help=text)], default))

    add("out", Path, OUT, recipe.out)
    add("overwrite", bool, OVERWRITE, False)
    add("checkpoint_every", int | None, EVERY, None)
    add("keep", int, KEPT, KEEP)
    add("resume", bool, RESUME, False)
    add("tensorboard", Path | None, BOARD, None)
    if len(recipe.kinds) > 1:
        add("recipe", Literal[recipe.kinds], _kinds_help(recipe), "small")
    if recipe.published:
        add("published", bool, recipe.published_help, False)
    names = [field.name for field in dataclasses.fields(run)]

    def train(flags: Any) -> None:
        # Created here, not by the parser, so that errors of the run's checks take one line.
        with naming_flags(names):
            recipe.train(
                type(run)(**{name: getattr(flags, name) for name in names}),
                flags.out,
                overwrite=flags.overwrite,
                checkpoint_every=flags.checkpoint_every,
                keep=flags.keep,
                resume=flags.resume,
                kind=getattr(flags, "recipe", "small"),
                tensorboard=flags.tensorboard,
            )

    made: Any = make_dataclass(
        type(run).__name__,
        more,
        bases=(type(run),),
        namespace={"__post_init__": lambda flags: None, "__call__": train},
        frozen=True,
        kw_only=True,
    )
    made.__doc__ = type(run).__doc__
    return made(**vars(run))


def _kinds_help(recipe: Recipe) -> str:
    kinds = "; ".join(KINDS[kind] for kind in recipe.kinds)
    return f"Defaults of the other flags: {kinds}. `--recipe {recipe.kinds[-1]} --help` shows them."
