"""The language model on the prose that ships with Python: what is compared, and what judges it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dblocks import text_metrics
from dblocks.blocks import BlocksConfig
from dblocks.checkpoint import load_model, prepare, save_model
from dblocks.experiments._base import Experiment, Records
from dblocks.metrics import next_token_nll
from dblocks.plots import Curve, Measure, comparison_figure, save_png
from dblocks.recipes.causal_lm import PROMPT, SAMPLES, TextRun, continuations
from dblocks.records import read_record, train, write_record
from dblocks.report import COSTS, README_COSTS, Column, Record, Rows, spread
from dblocks.text import Corpus

NGRAM = 4  # characters; the held-out text has some 13,000 different runs of four
REPEATED = 12  # characters: a run of so many that comes again in a sample is a loop, not a word
SCORER_SEED = 1000
SCORER_FOLDER = Path("runs/causal-lm-scorer")
SCORES_FILE = "scores.json"
RUN_FILE = "run.json"
BITS = Measure(
    label="bits a character, first 2,100 held-out characters",
    title="Next-token bits against the layers run in training",
    form="{:.2f} bits",
    best=1.0,
    step=0.5,
)

# A layer is evaluated once a step end to end; in blocks twice, on clean and on noisy rows, but the
# last layer of a block once, as its clean rows give keys and values only: 7 a step in 4 layers.
BLOCKS = TextRun(blocks=3, steps=1440)
END_TO_END = TextRun(end_to_end=True, steps=840)
END_TO_END_LONG = TextRun(end_to_end=True, steps=1440)
ROWS: Mapping[str, tuple[str, TextRun]] = {
    "blocks": ("3 blocks, equal layer evaluations", BLOCKS),
    "end_to_end": ("end to end", END_TO_END),
    "end_to_end_long": ("end to end, 1.7 times the steps (equal samples)", END_TO_END_LONG),
}
LRS = (5e-4, 1e-3, 2e-3)


def bits(record: Record) -> float:
    """Bits per character of the held-out text; in blocks of the first block alone."""
    return record["bits"]


def bits_of_all_blocks(record: Record) -> float | None:
    """The bound with a denoising step for each block; None end to end."""
    return record["bits_by_denoising_steps"].get(str(record["run"]["blocks"]))


def score(name: str, key: str | None = None) -> Callable[[Record], float | None]:
    """What `finish` found of a record's samples: of all blocks and of the plain model, or `key`."""

    def of(record: Record) -> float | None:
        plain = record["run"]["end_to_end"]
        found = record["scores"].get(key or ("plain" if plain else str(record["run"]["blocks"])))
        return None if found is None else found[name]

    return of


QUALITY = (
    ("bits", "Samples: bits a character under another model", ".2f"),
    ("divergence", f"Samples: divergence of {NGRAM}-grams from the held-out text", ".3f"),
    ("known", f"Samples: share of {NGRAM}-grams that occur in it", ".3f"),
    ("repetition", f"Samples: share of {REPEATED}-grams that repeat", ".3f"),
)


def _quality_columns() -> tuple[Column, ...]:
    def column(name: str, head: str, form: str) -> Column:
        return Column(head, lambda records: spread(records, score(name), form))

    return tuple(column(*entry) for entry in QUALITY)


BITS_COLUMNS = (
    Column("Bits a character, next token", lambda r: spread(r, bits, ".3f")),
    Column("Bits a character, all blocks (bound)", lambda r: spread(r, bits_of_all_blocks, ".3f")),
)
COLUMNS = (*BITS_COLUMNS, *_quality_columns(), *COSTS)
README_COLUMNS = (
    Column("Learning rate", lambda r: f"{r[0]['run']['lr']:g}"),
    *BITS_COLUMNS,
    *_quality_columns(),
    *README_COSTS,
)


def finish(folder: Path, records: Mapping[str, Records]) -> None:
    """Adds "scores" to every record: what another model and n-grams say of its samples.

    The scores are kept in scores.json. The model is trained where its checkpoint is not there, from
    a seed of its own, end to end, on as much as the longest row.
    """
    flat = [record for many in records.values() for record in many]
    samples = {
        f"{row}-seed{record['run']['seed']}-{key}": texts
        for row, many in records.items()
        for record in many
        for key, texts in record["samples_written"].items()
    }
    corpus = TextRun.from_dict(flat[0]["run"]).corpus()
    stored = _stored(folder / SCORES_FILE)
    if stored is None or stored["samples"] != samples or stored["sha256"] != corpus.sha256:
        stored = score_all(samples, corpus, scorer_run(flat))
        write_record(folder / SCORES_FILE, stored)
    for row, many in records.items():
        for record in many:
            prefix = f"{row}-seed{record['run']['seed']}-"
            record["scores"] = {
                key: stored["scores"][prefix + key] for key in record["samples_written"]
            }
            record["scores"]["reference"] = stored["scores"]["reference"]


def scorer_run(records: Records) -> TextRun:
    """The run of the model that scores samples: the longest row's, with a seed of its own."""
    plain = [TextRun.from_dict(r["run"]) for r in records if r["run"]["end_to_end"]]
    return dataclasses.replace(max(plain, key=lambda run: run.steps), seed=SCORER_SEED)


def score_all(samples: Mapping[str, Sequence[str]], corpus: Corpus, run: TextRun) -> dict[str, Any]:
    """Scores of the samples, and under "reference" of the held-out text in their place."""
    model = _scorer(run)
    prompts, truth = continuations(corpus.evaluated, run.context)
    reference = [corpus.tokenizer.decode(row.tolist()) for row in truth]
    held_out = corpus.tokenizer.decode(corpus.evaluated.tokens.tolist())
    scores = {
        name: {
            "bits": _bits_under(model, prompts, _tokens(texts, corpus)),
            "divergence": text_metrics.ngram_divergence(texts, held_out, NGRAM),
            "known": text_metrics.known_share(texts, held_out, NGRAM),
            "repetition": text_metrics.repetition_rate(texts, REPEATED),
        }
        for name, texts in {**samples, "reference": reference}.items()
    }
    return {
        "format": 1,
        "run": run.to_dict(),
        "sha256": corpus.sha256,
        "scores": scores,
        "samples": dict(samples),
    }


def _stored(path: Path) -> dict[str, Any] | None:
    return read_record(path) if path.exists() else None


def _scorer(run: TextRun) -> Any:
    if (SCORER_FOLDER / RUN_FILE).exists():
        record = read_record(SCORER_FOLDER / RUN_FILE)
        if TextRun.from_dict(record["run"]) == run:
            return load_model(SCORER_FOLDER)
    print(f"training the model that scores samples, for {SCORER_FOLDER}")
    prepare(SCORER_FOLDER)
    trained = train(run, progress=True)
    save_model(SCORER_FOLDER, trained.learner.trained)
    write_record(SCORER_FOLDER / RUN_FILE, trained.record)
    return trained.learner.trained


def _tokens(texts: Sequence[str], corpus: Corpus) -> Tensor:
    return torch.tensor([corpus.tokenizer.encode(text) for text in texts])


@torch.no_grad()
def _bits_under(model: Any, prompts: Tensor, written: Tensor) -> float:
    """Bits a character of what follows the prompts."""
    nats = next_token_nll(model, torch.cat([prompts, written], dim=1))
    return nats[:, PROMPT - 1 :].double().mean().item() / math.log(2)


def caption(rows: Rows) -> str:
    """How the table was made, in a paragraph for the README."""
    first = next(iter(rows.values()))
    run, scores = first[0]["run"], first[0]["scores"]["reference"]
    seeds = ", ".join(map(str, EXPERIMENT.seeds))
    rates = ", ".join(f"{lr:g}" for lr in LRS)
    reference = ", ".join(f"{scores[name]:{form}}" for name, _, form in QUALITY)
    one_step = ", ".join(spread(first, score(name, "1"), form) for name, _, form in QUALITY)
    return (
        f"A Llama-like model of {run['depth']} layers and width {run['width']} on characters: the "
        "documentation that ships with Python (`pydoc_data.topics`), 400,000 characters (sha256 "
        f"{first[0]['sha256'][:12]}...), the last 10 % held out; windows of {run['context']}, "
        f"{run['batch_size']} a batch, AdamW with a cosine; mean ± sample standard deviation of "
        f"seeds {seeds}. Each line's learning rate is the best of {{{rates}}} on the tenth before "
        "the held-out one, in runs of a third of the steps. A layer evaluation is one batch of "
        "rows through one layer: in blocks clean and noisy rows count each, but in a block's last "
        'layer, where clean rows give keys and values only. "Next token" is in blocks the first '
        'block alone, one call from sigma_max; "all blocks" takes the probabilities of the last '
        f"of {run['blocks']} Euler steps, and bounds the bits from above. Samples continue "
        f"{SAMPLES} places of the held-out text by {run['context'] - PROMPT} characters at "
        "temperature 1, in blocks with a step for each block; with the first block alone they "
        f"reach, in the order of the columns, {one_step}; the held-out text in its place "
        f"{reference}. The other model is trained as the last line, from another seed. Seconds are "
        "for one thread of a shared CPU, two runs at a time. Every run's record is in "
        "`benchmarks/results/causal_lm_pydoc/`; `make results` makes the table from them and runs "
        "those that are missing."
    )


def draw(rows: Rows, path: Path) -> None:
    """The figure of finished runs: bits a character against layer evaluations, and the noise."""
    curves = [
        Curve(
            label=name,
            layer_evaluations=[point["layer_evaluations"] for point in runs[0]["curve"]],
            values=[[point["bits"] for point in run["curve"]] for run in runs],
        )
        for name, runs in rows.items()
    ]
    blocked = next(run for runs in rows.values() for run in runs if run["blocks"] is not None)
    config = BlocksConfig.from_dict(blocked["blocks"])
    figure = comparison_figure(
        curves,
        config.schedule,
        config.num_blocks,
        config.layer_ranges(blocked["run"]["depth"]),
        title="A 12-layer language model on Python's documentation, end to end and in blocks",
        measure=BITS,
    )
    save_png(figure, path)


EXPERIMENT = Experiment(
    name="causal-lm-pydoc",
    rows=ROWS,
    lrs=LRS,
    selection_shorter={"blocks": 3, "end_to_end": 3, "end_to_end_long": 3},
    error=bits,
    headline=lambda record: f"{bits(record):.3f} bits a character",
    columns=COLUMNS,
    readme_columns=README_COLUMNS,
    caption=caption,
    draw=draw,
    finish=finish,
)
