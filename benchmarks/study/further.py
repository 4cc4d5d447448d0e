"""Rows beside the experiments on text and on digits: plain small networks, ensembles, choices.

Each study has the name of an experiment, whose records it shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.study import causal_lm, dit, masked_lm, recurrent
from benchmarks.study.ensembles.runs import EnsembleDiTRun, EnsembleMaskedRun
from benchmarks.study.experiment import Experiment
from benchmarks.study.layers import TopShareRun
from benchmarks.study.rows import Row, Study
from dblocks.recipes.recurrent import RecurrentRun, RecurrentTrainer

# Hours of a run on one core, by the records.
DIT_HOURS, MASKED_HOURS, CAUSAL_HOURS, RECURRENT_HOURS = 0.08, 0.06, 0.15, 0.15
TOP_SHARES = (0.0, 0.3)  # beside the experiment's .6 and 1
MASKED_TOP_SHARES = (0.3, 0.6)  # beside its 0


def shared_rows(experiment: Experiment, hours: Mapping[str, float]) -> list[Row]:
    """The rows of an experiment, as a study has them.

    Args:
        experiment: whose records count.
        hours: of a final run, by row.
    """
    return [
        Row(
            name=name,
            title=title,
            method="end to end" if run.end_to_end else "DiffusionBlocks",
            run=run,
            lrs=experiment.rates(name) if name in experiment.selection_shorter else (),
            rate_of=experiment.rates_of.get(name),
            shorter=experiment.selection_shorter.get(name, 1),
            seeds=experiment.seeds,
            hours=hours.get(name, hours[""]),
        )
        for name, (title, run) in experiment.rows.items()
    ]


def study_of(experiment: Experiment, title: str, rows: Sequence[Row]) -> Study:
    """A study on the records of an experiment."""
    return Study(
        name=experiment.name,
        title=title,
        rows=rows,
        quality=experiment.quality,
        headline=experiment.headline,
        columns=experiment.columns,
    )


def _further(like: Row, name: str, title: str, run: Any, **other: Any) -> Row:
    return replace(like, name=name, title=title, run=run, **other)


def digits_rows() -> list[Row]:
    """A DiT of 4 layers, and three of them that take turns."""
    rows = shared_rows(dit.EXPERIMENT, {"": DIT_HOURS, "end_to_end_long": 3 * DIT_HOURS})
    whole = rows[0]
    steps = 3 * dit.END_TO_END.steps
    small = replace(dit.END_TO_END, depth=dit.END_TO_END.depth // 3, steps=steps)
    ensemble = EnsembleDiTRun(**{**vars(dit.END_TO_END), "steps": steps}, members=3)
    return [
        *rows,
        _further(whole, "small", "a DiT of 4 layers, end to end", small, method="small plain"),
        _further(
            whole, "small_ensemble", "3 DiTs of 4 layers, averaged", ensemble, method="small plain"
        ),
    ]


def masked_rows() -> list[Row]:
    """A masked model of 4 layers, three of them that take turns, and blocks that see all masked."""
    rows = shared_rows(masked_lm.EXPERIMENT, {"": MASKED_HOURS, "end_to_end_long": 0.16})
    blocks, whole = rows[0], rows[1]
    run = masked_lm.END_TO_END
    steps = 3 * run.steps
    ensemble = EnsembleMaskedRun(**{**vars(run), "steps": steps}, members=3)
    plain = {"method": "small plain"}
    return [
        *rows,
        _further(
            whole, "small", "a model of 4 layers", replace(run, depth=4, steps=steps), **plain
        ),
        _further(whole, "small_ensemble", "3 models of 4 layers, averaged", ensemble, **plain),
        *(
            _further(
                blocks, f"top_share_{share:g}".replace("0.", ""), f"3 blocks, top_share {share:g}",
                TopShareRun(**vars(masked_lm.BLOCKS), top_share=share),
                part="top_share", lrs=(), rate_of="blocks", planned=False,
            )
            for share in MASKED_TOP_SHARES
        ),
    ]  # fmt: skip


def causal_rows(experiment: Experiment) -> list[Row]:
    """Blocks by the share of draws at sigma_max."""
    long = {"end_to_end_long": 3 * CAUSAL_HOURS}
    rows = shared_rows(experiment, {"": CAUSAL_HOURS, **long})
    blocks = rows[0]
    return [
        *rows,
        *(
            _further(
                blocks, f"top_share_{share:g}".replace("0.", ""), f"3 blocks, top_share {share:g}",
                replace(blocks.run, top_share=share),
                part="top_share", lrs=(), rate_of="blocks", planned=False,
            )
            for share in TOP_SHARES
        ),
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PlainRun(RecurrentRun):
    """Train the layers of a recurrent model without recurrence: the core runs once."""

    def trainer(self) -> RecurrentTrainer:
        """The network of this run with its data, ready to train."""
        trainer = RecurrentTrainer(self, self.read_corpus(self.part))
        # Otherwise recurrences are drawn, one and some more.
        trainer.end_to_end_loss = lambda lm, batch: lm.next_token_loss(
            batch, num_recurrences=1, generator=trainer.generator
        )
        return trainer


def recurrent_rows() -> list[Row]:
    """Plain networks, whose core is applied once, and the block in a single stream alone."""
    rows = shared_rows(recurrent.EXPERIMENT, {"": RECURRENT_HOURS})
    (whole,) = (row for row in rows if row.name == "end_to_end")
    (blocks,) = (row for row in rows if row.name == "blocks")
    once = {**vars(recurrent.END_TO_END), "mean_recurrence": 1, "backprop_depth": 1}

    def plain(like: RecurrentRun) -> PlainRun:
        # A step of the block runs each layer once, as one of a plain network does.
        return PlainRun(**{**once, "steps": like.steps})

    learned = replace(recurrent.BLOCKS, head="learned", top_share=0.0)
    return [
        *rows,
        _further(
            whole, "plain_long", "a plain network of 8 layers, layer evaluations of the first",
            plain(recurrent.BLOCKS_LONG), lrs=(), rate_of="plain", method="small plain",
            part="choices",
        ),
        _further(
            whole, "plain", "a plain network of 8 layers, a tenth of the layer evaluations",
            plain(recurrent.BLOCKS), method="small plain", part="choices",
        ),
        _further(
            blocks, "single_learned", "1 block, learned head and draws within its range", learned,
            part="choices", planned=False,
        ),
    ]  # fmt: skip


DIT_DIGITS = study_of(
    dit.EXPERIMENT, "a 12-layer DiT of width 64, patches of 2, on handwritten digits", digits_rows()
)
MASKED = study_of(
    masked_lm.EXPERIMENT, "a 12-layer masked model of width 96 on pydoc", masked_rows()
)
PYDOC = study_of(
    causal_lm.EXPERIMENT,
    "a 12-layer language model of width 192 on pydoc",
    causal_rows(causal_lm.EXPERIMENT),
)
RECURRENT = study_of(
    recurrent.EXPERIMENT, "a recurrent-depth model of width 96 on pydoc", recurrent_rows()
)
STUDIES = (DIT_DIGITS, MASKED, PYDOC, RECURRENT)
