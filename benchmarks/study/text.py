"""Judging generated text: what another model and n-grams say of the samples in records."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.study.archive import Archive
from benchmarks.study.experiment import Records
from benchmarks.study.pages import seeds_of
from benchmarks.study.plots import Measure
from benchmarks.study.text_features import NGRAM, held_out_texts, more_scores
from dblocks.checkpoint import load_model, prepare, save_model
from dblocks.recipes.causal_lm import CausalLMRun
from dblocks.recipes.data.text import Corpus
from dblocks.recipes.metrics.ngrams import known_share, ngram_divergence, repetition_rate
from dblocks.recipes.records import FORMAT, read_record, train, write_record
from dblocks.recipes.tables import Column, Record, Rows, spread
from dblocks.recipes.text_run import PROMPT
from dblocks.sampling import next_token_nll

REPEATED = 12  # characters: a run of so many that comes again in a sample is a loop, not a word
# As the longest row of the language model's table, from a seed that no row has.
SCORER = CausalLMRun(end_to_end=True, steps=1440, lr=1e-3, seed=1000)
SCORER_FOLDER = Path("runs/causal-lm-scorer")  # of pydoc; other texts' have their names behind it
SCORES = "scores"  # the name of their record
RUN_FILE = "run.json"

NO_MAUVE = (
    "MAUVE is not shown: these samples were not scored with the packages of `dblocks[mauve]`."
)

# Name, head, form, and why a table may lack it.
QUALITY: tuple[tuple[str, str, str, str | None], ...] = (
    ("bits", "Samples: bits per character under another model", ".2f", None),
    ("divergence", f"Samples: divergence of {NGRAM}-grams from the held-out text", ".3f", None),
    ("known", f"Samples: share of {NGRAM}-grams that occur in it", ".3f", None),
    ("repetition", f"Samples: share of {REPEATED}-grams that repeat", ".3f", None),
    (
        "distinct",
        f"Samples: share of different {NGRAM}-grams (distinct-{NGRAM})",
        ".3f",
        "Different n-grams are not shown: they were not counted of these samples.",
    ),
    ("mauve", "Samples: MAUVE against the held-out text", ".2f", NO_MAUVE),
)


def score(name: str, key: Callable[[Record], str | None]) -> Callable[[Record], float | None]:
    """Reads what `add_scores` found of those samples of a record that `key` names."""

    def of(record: Record) -> float | None:
        of_samples = key(record)
        found = None if of_samples is None else record.get("scores", {}).get(of_samples)
        return None if found is None else found.get(name)

    return of


def quality_columns(key: Callable[[Record], str]) -> tuple[Column, ...]:
    """A column for each measure of the samples that `key` names."""

    def column(name: str, head: str, form: str, absent: str | None) -> Column:
        return Column(head, lambda records: spread(records, score(name, key), form), absent)

    return tuple(column(*entry) for entry in QUALITY)


def next_token_measure(rows: Rows) -> Measure:
    """How curves of next-token bits are shown, and what part of the held-out text they are of."""
    points = (p for records in rows.values() for record in records for p in record["curve"])
    return Measure(
        label=f"bits per character, {' or '.join(sorted({_part(point) for point in points}))}",
        title="Next-token bits against the layers run in training",
        form="{:.2f} bits",
        best=1.0,
        step=0.5,
    )


def _part(point: Mapping[str, Any]) -> str:
    # Records of the time before windows were spread over the text do not tell their number.
    windows = point.get("windows")
    return "first 2,100 held-out characters" if windows is None else f"{windows} held-out windows"


def reference_scores(record: Record) -> str:
    """What the held-out text itself scores, in the order of the measures."""
    scores = record["scores"]["reference"]
    return ", ".join(f"{scores[name]:{form}}" for name, _, form, _ in QUALITY if name in scores)


def scored_by(record: Record) -> list[str]:
    """Names of the scores of a record, in the order of the measures."""
    return [name for name, *_ in QUALITY if name in record["scores"]["reference"]]


def scored_text(rows: Rows) -> str | None:
    """The names and values of what the held-out text itself scores; None without scores."""
    first = next((r for many in rows.values() for r in many if SCORES in r), None)
    if first is None:
        return None
    return f"({', '.join(scored_by(first))}) {reference_scores(first)}"


def not_scored(rows: Rows) -> str:
    """A sentence on the rows whose samples have no scores, with a space before; or nothing."""
    bare = [title for title, many in rows.items() if any(SCORES not in r for r in many)]
    return f" Samples are not scored yet of: {'; '.join(bare)}." if bare else ""


TEXTS = {
    "pydoc": "characters of the documentation that ships with Python (`pydoc_data.topics`), "
    "400,000 of them",
    "gcide": "20,000,000 letters and spaces of the Collaborative International Dictionary of "
    "English (Debian's package dict-gcide), whose last words are held out",
}


def _of_windows(run: Mapping[str, Any]) -> str:
    return "" if run["data"] == "pydoc" else f", and {run['windows']} windows of them scored"


def text_and_training(rows: Rows) -> str:
    """What all comparisons on text have in common, for a caption."""
    record = next(iter(rows.values()))[0]
    run = record["run"]
    text = TEXTS.get(run["data"], run["data"])
    return (
        f"on {text} (sha256 {record['sha256'][:12]}...), the last 10 % held out"
        f"{_of_windows(run)}; windows of "
        f"{run['context']}, {run['batch_size']} a batch, AdamW with a cosine; mean ± sample "
        f"standard deviation of seeds {seeds_of(rows)}"
    )


def add_scores(
    folder: Path, records: Mapping[str, Records], shown: Callable[[Record], str]
) -> None:
    """Adds "scores" to every record: what other models and n-grams say of its samples.

    A record has them in "samples_written", by name. The scores are kept beside the records, with a
    digest of the samples, so that other samples are scored again. The model is that of `SCORER`,
    the same for all experiments, trained where its checkpoint is not there.

    Args:
        folder: of the records.
        records: by row.
        shown: the samples of a record that tables show, which alone get a MAUVE score.
    """
    samples = {
        f"{_prefix(row, record)}{key}": texts
        for row, many in records.items()
        for record in many
        for key, texts in record["samples_written"].items()
    }
    scorer = scorer_of(next(iter(records.values()))[0]["run"]["data"])
    corpus = scorer.corpus()
    made = {"run": scorer.to_dict(), "sha256": corpus.sha256, "samples": digest(samples)}
    stored = Archive(folder).load().get(SCORES)
    found = None if stored is None else {key: stored[key] for key in made}
    if stored is None or found != made:
        # Older files hold the samples themselves.
        same = found == made | {"samples": samples}
        scores = stored["scores"] if stored and same else score_all(samples, corpus, scorer)
        stored = {"format": FORMAT, **made, "scores": scores}
        found = None
    for row, many in records.items():
        for record in many:
            _attach(record, row, stored["scores"])
    chosen = {
        f"{_prefix(row, record)}{shown(record)}" for row, many in records.items() for record in many
    }
    more = more_scores(samples, chosen, corpus, scorer.context, stored["scores"])
    for name, added in more.items():
        stored["scores"][name] |= added
    if found is None or more:
        write_record(folder / f"{SCORES}.json", stored)


def stored_scores(folder: Path, records: Mapping[str, Records]) -> dict[str, Records]:
    """All rows, with the scores of the records whose samples were scored; nothing is computed."""
    stored = Archive(folder).load().get(SCORES, {}).get("scores", {})
    for row, many in records.items():
        for record in many:
            if all(f"{_prefix(row, record)}{key}" in stored for key in record["samples_written"]):
                _attach(record, row, stored)
    return dict(records)


def _prefix(row: str, record: Mapping[str, Any]) -> str:
    return f"{row}-seed{record['run']['seed']}-"


def _attach(record: dict[str, Any], row: str, scores: Mapping[str, Any]) -> None:
    names = record["samples_written"]
    record["scores"] = {key: scores[_prefix(row, record) + key] for key in names}
    record["scores"]["reference"] = scores["reference"]


def digest(samples: Mapping[str, Sequence[str]]) -> str:
    """The SHA-256 of the samples, whatever the order of their names."""
    return hashlib.sha256(json.dumps(samples, sort_keys=True).encode()).hexdigest()


def scorer_of(data: str) -> CausalLMRun:
    """What trains the model that judges samples of a text."""
    return dataclasses.replace(SCORER, data=data)


def score_all(
    samples: Mapping[str, Sequence[str]], corpus: Corpus, scorer: CausalLMRun
) -> dict[str, Any]:
    """Scores of the samples, and under "reference" of the held-out text in their place."""
    model = _trained(scorer)
    prompts, reference = held_out_texts(corpus, scorer.context)
    held_out = corpus.tokenizer.decode(corpus.evaluated.tokens.tolist())
    return {
        name: {
            "bits": _bits_under(model, prompts, _tokens(texts, corpus)),
            "divergence": ngram_divergence(texts, held_out, NGRAM),
            "known": known_share(texts, held_out, NGRAM),
            "repetition": repetition_rate(texts, REPEATED),
        }
        for name, texts in {**samples, "reference": reference}.items()
    }


def _trained(scorer: CausalLMRun) -> Any:
    folder = SCORER_FOLDER
    if scorer.data != SCORER.data:
        folder = folder.with_name(f"{folder.name}-{Path(scorer.data).stem}")
    if (folder / RUN_FILE).exists():
        record = read_record(folder / RUN_FILE)
        if CausalLMRun.from_dict(record["run"]) == scorer:
            return load_model(folder)
    print(f"training the model that scores samples, for {folder}")
    prepare(folder)
    trained = train(scorer, progress=True)
    save_model(folder, trained.trainer.trained)
    write_record(folder / RUN_FILE, trained.record)
    return trained.trainer.trained


def _tokens(texts: Sequence[str], corpus: Corpus) -> Tensor:
    return torch.tensor([corpus.tokenizer.encode(text) for text in texts])


@torch.no_grad()
def _bits_under(model: Any, prompts: Tensor, written: Tensor) -> float:
    """Bits per character of what follows the prompts."""
    nats = next_token_nll(model, torch.cat([prompts, written], dim=1))
    return nats[:, PROMPT - 1 :].double().mean().item() / math.log(2)
