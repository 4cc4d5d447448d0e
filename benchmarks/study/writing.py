"""Tokens a second against the quality of what is written: `python -m benchmarks.study.writing`.

Language models of one size on one text: end to end with its cache, blocks that write a token at a
time, and blocks that write 4, 8 or 16 at once, with several numbers of Euler steps; a masked model
beside them. All train by as many layer evaluations, and are trained where their checkpoint is not
there, by the rates that docs/results.md chose (those of blocks serve the masked model too). Quality
is judged as there, at the temperature that brings the bits of what is written nearest to those of
the text; speed is of batch 1, one thread, all ways in turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.ops.timing import Run, environment, interleaved
from benchmarks.study.report.speed_of_writing import RECORD, speed_table
from benchmarks.study.text import SCORER, score_all
from dblocks.checkpoint import load_model, prepare, save_model
from dblocks.recipes.causal_lm import CausalLMRun
from dblocks.recipes.data.text import Corpus
from dblocks.recipes.masked_lm import MaskedLMRun
from dblocks.recipes.metrics import NOISE_SEED
from dblocks.recipes.records import read_record, train, use_one_thread, write_record
from dblocks.recipes.text_run import PROMPT, continuations
from dblocks.sampling import generate, unmask
from dblocks.schedules import MASKED

TOKENS = 64  # that are written to take the time
ROUNDS = 5
MODELS = Path("runs/writing")
EVALUATIONS = 10_080
BLOCKS = CausalLMRun(blocks=3, steps=EVALUATIONS // 4, points=1)
RUNS: dict[str, CausalLMRun | MaskedLMRun] = {
    "end to end": CausalLMRun(end_to_end=True, lr=5e-4, steps=EVALUATIONS // 12, points=1),
    "1 token": BLOCKS,
    "4 tokens": dataclasses.replace(BLOCKS, tokens_per_block=4),
    "8 tokens": dataclasses.replace(BLOCKS, tokens_per_block=8),
    "16 tokens": dataclasses.replace(BLOCKS, tokens_per_block=16),
    "masked": MaskedLMRun(blocks=3, steps=EVALUATIONS // 4, width=192, heads=3, points=1),
}
STEPS = (1, 3, 6, 12, 24, 48)
TEMPERATURES = (0.7, 0.8, 0.9, 1.0)
AT_A_TIME = {"4 tokens": 4, "8 tokens": 8, "16 tokens": 16}


class Way(NamedTuple):
    """A way to write: a model and how many steps a block of tokens, or a text, takes."""

    model: str
    how: str
    calls: float
    """Calls of 4 layers for each token."""
    options: dict[str, Any]


def ways(names: Sequence[str], steps: Sequence[int]) -> list[Way]:
    """What is compared."""
    found = []
    for name in names:
        k = AT_A_TIME.get(name, 1)
        if name == "end to end":
            found.append(Way(name, "with its cache", 3, {}))
        elif name == "masked":
            found += [Way(name, f"{n} steps", n / TOKENS, {"num_steps": n}) for n in steps if n > 3]
        else:
            found.append(Way(name, "product of 3 blocks", 3 / k, {"product": True}))
            # As many steps as a token takes end to end are enough for one token.
            several = [n for n in steps if n >= 3 and (k > 1 or n == 3)]
            found += [Way(name, f"{n} steps", n / k, {"num_steps": n}) for n in several]
    return found


def model_of(name: str, run: CausalLMRun | MaskedLMRun) -> Any:
    """The trained model, from its folder or trained now."""
    folder = MODELS / name.replace(" ", "-")
    made = folder / "run.json"
    if made.exists() and type(run).from_dict(read_record(made)["run"]) == run:
        return load_model(folder)
    prepare(folder)
    trained = train(run, progress=True)
    save_model(folder, trained.trainer.trained)
    write_record(made, trained.record)
    return trained.trainer.trained


def writer(
    model: Any, way: Way, prompts: torch.Tensor, tokens: int, temperature: float = 1.0
) -> Callable[[], torch.Tensor]:
    """Writes so many tokens after each prompt, int64 [N, tokens]."""
    options = {"temperature": temperature, **way.options}

    def write() -> torch.Tensor:
        generator = torch.Generator().manual_seed(NOISE_SEED)
        if way.model == "masked":
            gaps = torch.full((len(prompts), tokens), MASKED)
            text = torch.cat([prompts, gaps], dim=1)
            return unmask(model, text, generator=generator, **options).tokens[:, PROMPT:]
        rows = generate(model, prompts, max_new_tokens=tokens, generator=generator, **options)
        return torch.stack(rows)

    return write


def measure(names: Sequence[str], steps: Sequence[int], path: Path) -> list[dict[str, Any]]:
    """Every way's quality and speed; rows are printed as they come."""
    use_one_thread()
    corpus: Corpus = SCORER.corpus()
    prompts, _ = continuations(corpus.evaluated, SCORER.context)
    models = {name: model_of(name, RUNS[name]) for name in names}
    chosen = ways(names, steps)
    length, cpu = SCORER.context - PROMPT, torch.device("cpu")
    runs: dict[str, Run] = {
        f"{way.model}, {way.how}": writer(models[way.model], way, prompts[:1], TOKENS)
        for way in chosen
    }
    times = interleaved(runs, cpu, ROUNDS)
    own = score_all({}, corpus, SCORER)["reference"]
    rows = []
    for way in chosen:
        key = f"{way.model}, {way.how}"
        texts = {
            f"{t:g}": [
                corpus.tokenizer.decode(row.tolist())
                for row in writer(models[way.model], way, prompts, length, t)()
            ]
            for t in TEMPERATURES
        }
        scores = score_all(texts, corpus, SCORER)
        nearest = min(texts, key=lambda t: abs(scores[t]["bits"] - own["bits"]))
        seconds = statistics.median(times[key]) / 1e3
        row = {
            "run": {"model": way.model, "how": way.how},
            "calls": way.calls,
            "tokens": TOKENS,
            "tokens_per_second": TOKENS / seconds,
            "temperature": float(nearest),
            "scores": scores[nearest],
            "by_temperature": scores,
        }
        rows.append(row)
        print(key, f"{row['tokens_per_second']:.0f} tokens per second", row["scores"], flush=True)
    found = {"format": 1, "environment": environment(cpu), "rows": rows, "reference": own}
    write_record(path, found)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", choices=[*RUNS], default=[*RUNS])
    parser.add_argument("--steps", nargs="*", type=int, default=[*STEPS])
    parser.add_argument("--out", type=Path, default=RECORD, help="the record")
    args = parser.parse_args(argv)
    rows = measure(args.models, args.steps, args.out)
    print(speed_table(rows))


if __name__ == "__main__":
    main()
