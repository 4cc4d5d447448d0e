"""The language model over a factor of 8 of budget: where depth begins to pay, and for whom.

A line of the curve is one run at a constant rate, with a branch at each point: there the last fifth
of the steps cools down to 0. So the points of a line share all steps before their branches.
`make study-report` shows the points of the records that are there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.study.causal_lm import EVALUATIONS
from benchmarks.study.quality import BITS
from benchmarks.study.rows import Row, Study
from dblocks.config import json_text
from dblocks.models.causal_lm import CausalLM
from dblocks.recipes.autoregressive import AutoregressiveTrainer
from dblocks.recipes.causal_lm import CausalLMRun
from dblocks.recipes.columns import CAUSAL_LM, bits
from dblocks.recipes.keeping import FOLDER, Keeping
from dblocks.recipes.records import train, use_one_thread, write_record
from dblocks.recipes.tables import COSTS

SHARES = (1, 2, 4, 8)  # of EVALUATIONS
RISE = 20  # a twentieth of the steps of the first point
CHECKPOINTS = 16  # of a run, up to its branch
LRS = (5e-4, 1e-3, 2e-3)
SECONDS = 0.014  # of a layer evaluation on one core, measured


@dataclass(frozen=True, kw_only=True)
class BudgetRun(CausalLMRun):
    """Train a language model at a constant rate that cools down in the last fifth of the steps."""

    decay: Literal["cosine", "constant"] = "constant"
    rise: int
    """Steps of a rising learning rate, which do not depend on their number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay != "constant" or self.rise < 1:
            raise ValueError(
                f"decay must be constant and rise positive, got {self.decay!r} and {self.rise}"
            )

    @property
    def branch(self) -> int:
        """Steps before the rate falls, which runs of more steps take too."""
        return self.steps * 4 // 5

    def lr_at(self, step: int) -> float:
        """A linear rise, the rate itself, and a linear fall to 0."""
        if step < self.rise:
            return self.lr * (step + 1) / self.rise
        return self.lr * min(1.0, (self.steps - step) / (self.steps - self.branch))

    def trainer(self) -> BudgetTrainer:
        """The network of this run with its data, ready to train."""
        return BudgetTrainer(self)


class BudgetTrainer(AutoregressiveTrainer):
    """Trains a `CausalLM`, of which bits alone are measured."""

    def __init__(self, run: BudgetRun) -> None:
        corpus = run.corpus()
        super().__init__(
            run,
            run,
            corpus,
            lambda: CausalLM(run.model_config(corpus.tokenizer.size)),
            lambda lm, batch: lm.next_token_loss(batch),
        )

    def results(self, last: dict[str, Any]) -> dict[str, Any]:
        """Bits per character of the next token, of the first block and of the product."""
        windows = self.options.windows
        found = {"adaln": False, "sha256": self.corpus.sha256, "bits": self.bits(windows=windows)}
        if self.model is not None:
            found["product_bits"] = self.bits(product=True, windows=windows)
        return found


def train_from_branch(run: BudgetRun, path: Path, kept: Path) -> dict[str, Any]:
    """One run and its record; it begins at the last branch of a shorter run, where there is one.

    Args:
        run: a point of the curve.
        path: of its record.
        kept: the folder of checkpoints.
    """
    use_one_thread()
    folder = kept / path.parent.name / path.stem / FOLDER
    branches = kept / path.parent.name / f"branches-{_line(run)}"
    if not any(folder.glob("step-*")):
        _copy_branch(branches, folder, run.branch)
    # So many are kept that none is removed between the branch and the end, a quarter later.
    keeping = Keeping(
        folder=folder,
        every=max(1, run.branch // CHECKPOINTS),
        keep=2 * CHECKPOINTS,
        resume=True,
        also=run.branch,
    )
    record = train(run, keeping=keeping).record
    write_record(path, record)
    at = folder / f"step-{run.branch:08d}"
    if run.part == "final" and at.exists():
        shutil.rmtree(branches / at.name, ignore_errors=True)
        branches.mkdir(parents=True, exist_ok=True)
        at.rename(branches / at.name)
    shutil.rmtree(folder.parent, ignore_errors=True)
    return record


def _line(run: BudgetRun) -> str:
    """Names all that runs of a line have in common."""
    settings = {key: value for key, value in run.settings().items() if key != "steps"}
    return hashlib.sha256(json_text(settings).encode()).hexdigest()[:12]


def _copy_branch(branches: Path, folder: Path, most: int) -> None:
    """The last checkpoint of at most so many steps, which a killed copy does not spoil."""
    steps = [int(path.name.removeprefix("step-")) for path in branches.glob("step-*")]
    fitting = [step for step in steps if step <= most]
    if fitting:
        name = f"step-{max(fitting):08d}"
        shutil.rmtree(part := folder.with_name("copied"), ignore_errors=True)
        shutil.copytree(branches / name, part)
        folder.mkdir(parents=True, exist_ok=True)
        part.rename(folder / name)


def rows_of(run: CausalLMRun, evaluations: int = EVALUATIONS) -> list[Row]:
    """The points of every line, those of least budget first.

    Args:
        run: the sizes, and how many layers.
        evaluations: of layers at the first point.
    """
    sizes = {key: value for key, value in vars(run).items() if key not in ("steps", "decay")}
    lines = (
        ("end_to_end", "end to end", "end to end", {"end_to_end": True}),
        ("blocks", "3 blocks", "DiffusionBlocks", {"blocks": 3}),
        ("small", "a plain model of 4 layers", "small plain", {"end_to_end": True, "depth": 4}),
    )
    first = []
    for name, title, method, options in lines:
        depth = options.get("depth", run.depth) // options.get("blocks", 1)
        steps = evaluations // depth
        rise = max(1, steps // RISE)
        run_of_line = BudgetRun(**{**sizes, **options, "steps": steps, "rise": rise})
        first.append(
            Row(
                name=name,
                title=title,
                method=method,
                run=run_of_line,
                lrs=LRS,
                seeds=(0,),
                hours=evaluations * SECONDS / 3600,
            )
        )
    return [row if share == 1 else _at(row, share) for share in SHARES for row in first]


def _at(row: Row, share: int) -> Row:
    """A point of the curve: at the rate of the first one, from the branch of the one before."""
    return dataclasses.replace(
        row,
        name=f"{row.name}_x{share}",
        title=f"{row.title}, {share} times the budget",
        part="budget",
        run=dataclasses.replace(row.run, steps=row.run.steps * share),
        lrs=(),
        rate_of=row.name,
        # All steps but the four fifths that the point before took.
        hours=row.hours * share * (1 - 0.8 / 2),
    )


STUDY = Study(
    name="causal-lm-budget",
    title="a 12-layer language model of width 96 on a dictionary, and its curve over the budget",
    rows=rows_of(CausalLMRun(data="gcide", windows=512, width=96, points=1)),
    quality=BITS,
    headline=lambda record: f"{bits(record):.3f} bits per character",
    columns=(*CAUSAL_LM[:2], *COSTS),
    train=train_from_branch,
)
