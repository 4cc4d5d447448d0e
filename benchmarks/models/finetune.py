"""Fine-tunes a pretrained model in blocks, with and without its own loss, and end to end.

    python -m benchmarks.models.finetune --out benchmarks/results/finetune

A small Llama learns the documentation that ships with Python, once; every arm then takes the same
number of steps on the source of its standard library. Held-out bits a character of the plain model
say what an arm made of it, on the code and on the documentation it came from; those of the blocks
what they learned; costs are counted. Each arm's learning rate is the best of four on other modules
than those held out: by the plain model's bits where its loss is trained, by the blocks' elsewhere.

It computes on one thread: a model so small gains little by more.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.models import finetune_report, finetune_text
from benchmarks.models.pretrained import Pretraining, pretrained
from benchmarks.models.saved import PeakSaved
from benchmarks.ops import timing
from dblocks import BlocksConfig, info, make_optimizers, train_step
from dblocks.blocks.targets.classes import Head
from dblocks.integrations.convert import ConvertedBlocks, convert
from dblocks.integrations.convert.causal_lm import Rows
from dblocks.recipes.autoregressive import bits_per_character, bound_of
from dblocks.recipes.data.text import Text
from dblocks.recipes.records import read_record, use_one_thread, write_record
from dblocks.schedules import NoiseSchedule

FORMAT = 1
DENOISING_SEED = 11  # of the levels and the noise that held-out denoising is measured with
BOUND_WINDOWS = 16  # of a text, whose bound takes two calls of every block
SCHEDULE = NoiseSchedule(p_mean=0.0, p_std=2.0)  # as of the text models of dblocks.recipes
OVERLAP = 0.1
PARTS = ("training", "validation", "held_out")


@dataclass(frozen=True)
class Arm:
    """A way to fine-tune."""

    name: str
    trains: Literal["all", "layers", "added", "shared"]
    """Everything end to end; or of a block its layers alone, what the conversion adds outside the
    layers too, or all that is outside."""
    clean_loss_weight: float = 0.0
    rows: Rows = "single"
    head: Head = "posterior"

    @property
    def by_plain(self) -> bool:
        """Whether the plain model's loss is trained, so that its bits choose the rate."""
        return self.trains == "all" or self.clean_loss_weight > 0


PUBLISHED: tuple[Rows, Head] = ("doubled", "learned")
ARMS = (
    Arm("end to end", "all"),
    Arm("blocks, layers, denoising only", "layers"),
    Arm("blocks, layers, clean loss 1", "layers", 1.0),
    Arm("blocks, layers and what is added, clean loss 1", "added", 1.0),
    Arm("blocks, all shared parameters, denoising only", "shared"),
    Arm("blocks, all shared parameters, clean loss 1", "shared", 1.0),
    Arm("as published, layers and what is added, clean loss 1", "added", 1.0, *PUBLISHED),
    Arm("as published, all shared parameters, denoising only", "shared", 0.0, *PUBLISHED),
)


@dataclass(frozen=True)
class Settings:
    """All that decides the figures, but for the texts."""

    pretraining: Pretraining = field(default_factory=Pretraining)
    blocks: int = 3
    steps: int = 200
    selection_steps: int = 50
    batch_size: int = 2
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    seeds: tuple[int, ...] = (0, 1, 2)
    selection_seed: int = 100
    windows: int | None = 64
    """Of a text, spread evenly, whose second halves are scored; None: all."""


class Trainee(NamedTuple):
    """A copy of the pretrained model in training."""

    network: Any
    """The model, or the `ConvertedBlocks` around it."""
    step: Callable[[Tensor, int | None], object]
    """Trains on tokens [N, T]; one block, or the whole."""
    loss: Callable[[Tensor, int], Tensor]
    """The loss that such a step minimises."""
    optimizers_of: Callable[[int], Sequence[Optimizer]]
    optimizers: Sequence[Optimizer]


def trainee(model: Any, arm: Arm, settings: Settings, seed: int) -> Trainee:
    """A copy of `model` at a learning rate of 0; `seed` is of what is added and of the draws."""
    model = copy.deepcopy(model)
    if arm.trains == "all":
        whole = pretrained.adamw(model.parameters(), lr=0.0)
        return Trainee(
            model,
            lambda tokens, block: pretrained.plain_step(model, whole, tokens),
            lambda tokens, block: pretrained.plain_loss(model, tokens),
            lambda block: [whole],
            [whole],
        )
    blocks = converted(model, arm, settings, seed)
    optimizers = make_optimizers(blocks, lambda params: pretrained.adamw(params, lr=0.0))
    generator = torch.Generator().manual_seed(seed)

    def step(tokens: Tensor, block: int | None) -> object:
        return train_step(
            blocks, {"tokens": tokens}, optimizers,
            block=block, generator=generator, clip_grad_norm=pretrained.CLIP,
        )  # fmt: skip

    def loss(tokens: Tensor, block: int) -> Tensor:
        draws = torch.Generator().manual_seed(DENOISING_SEED)
        return blocks.loss({"tokens": tokens}, block, generator=draws).loss

    return Trainee(blocks, step, loss, optimizers.of_block, list(optimizers))


def converted(model: Any, arm: Arm, settings: Settings, seed: int) -> ConvertedBlocks:
    """The model in blocks, with what `arm` does not train frozen."""
    config = BlocksConfig(
        num_blocks=settings.blocks,
        schedule=SCHEDULE,
        overlap=OVERLAP,
        shared="frozen" if arm.trains == "layers" else "train",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = convert(
            model, config, task="tokens",
            clean_loss_weight=arm.clean_loss_weight, rows=arm.rows, head=arm.head,
        )  # fmt: skip
    if arm.trains == "added":
        own = {id(p) for p in model.parameters()}
        for parameter in blocks.shared_parameters():
            parameter.requires_grad_(id(parameter) not in own)
    return blocks


def finetune(
    model: Any, arm: Arm, settings: Settings, text: Text, each: Callable[[], object],
    *, lr: float, seed: int, steps: int,
) -> Any:  # fmt: skip
    """A fine-tuned copy of `model`: plain, or in blocks."""
    how = trainee(model, arm, settings, seed)
    for step in range(steps):
        for optimizer in how.optimizers:
            pretrained.set_rate(optimizer, pretrained.rate_at(step, steps, lr))
        tokens = pretrained.windows_of(
            text, settings.pretraining, settings.batch_size, seed=seed, step=step
        )
        how.step(tokens, None)
        each()
    return how.network


def scores(network: Any, settings: Settings, text: Text) -> dict[str, float]:
    """Bits a character of a text: of the plain model, of the first block's one call, of the
    product of all blocks, the bound of all blocks, and the denoising loss, a mean over blocks and
    over the levels of each."""
    context, windows = settings.pretraining.context, settings.windows
    if not isinstance(network, ConvertedBlocks):
        return {"plain": pretrained.plain_bits(network, text, context, windows)}
    found = {"plain": pretrained.plain_bits(network.base_model.model, text, context, windows)}
    found["block"] = bits_per_character(network, text, context, windows=windows)
    found["product"] = bits_per_character(network, text, context, windows=windows, product=True)
    found["bound"] = bound_of(network, text, context, windows=BOUND_WINDOWS)["bits"]
    tokens = pretrained.windows_of(text, settings.pretraining, 16, seed=DENOISING_SEED, step=0)
    found["denoising"] = denoising_bits(network, tokens)
    return found


@torch.no_grad()
def denoising_bits(blocks: ConvertedBlocks, tokens: Tensor) -> float:
    """The mean of the blocks' cross-entropies, each over its own levels, in bits."""
    generator = torch.Generator().manual_seed(DENOISING_SEED)
    weight, config = blocks.clean_loss_weight, blocks.config
    blocks.clean_loss_weight, blocks.config = 0.0, replace(config, top_share=0.0)
    losses = [
        blocks.loss({"tokens": tokens}, b, generator=generator).losses.mean().item()
        for b in range(blocks.config.num_blocks)
    ]
    blocks.clean_loss_weight, blocks.config = weight, config
    return statistics.fmean(losses) / math.log(2)


def costs(model: Any, arms: Sequence[Arm], settings: Settings, rounds: int) -> list[dict[str, Any]]:
    """What a step of each arm holds, at the block that holds most, and takes, at their mean."""
    tokens = torch.zeros(settings.batch_size, settings.pretraining.context, dtype=torch.int64)
    found, runs = [], {}
    for arm in arms:
        how = trainee(model, arm, settings, seed=0)
        blocks = range(1 if arm.trains == "all" else settings.blocks)

        def all_blocks(how: Trainee = how, blocks: range = blocks) -> None:
            for block in blocks:
                how.step(tokens, block)

        all_blocks()  # Adam makes its state at the first step
        held = [_held(how, tokens, block) for block in blocks]
        row = {name: max(h[name] for h in held) for name in held[0]}
        row["process_optimizer_bytes"] = _state_bytes(how.optimizers)
        found.append({"arm": arm.name, "steps_timed_together": len(blocks), **row})
        runs[arm.name] = all_blocks
    times = timing.interleaved(runs, torch.device("cpu"), rounds, round_ms=1.0)
    for row in found:
        share = row["steps_timed_together"]
        row |= {k: v / share for k, v in timing.summary(times[row["arm"]]).items()}
    return found


def _held(how: Trainee, tokens: Tensor, block: int) -> dict[str, int]:
    parameters = list(how.network.parameters())
    with PeakSaved(parameters) as saved:
        loss = how.loss(tokens, block)
    loss.backward()
    grads = [p.grad for p in parameters if p.grad is not None]
    how.network.zero_grad(set_to_none=True)
    return {
        "parameters": sum(g.numel() for g in grads),
        "gradient_bytes": sum(g.nbytes for g in grads),
        "optimizer_bytes": _state_bytes(how.optimizers_of(block)),
        "saved_bytes": saved.peak,
    }


def _state_bytes(optimizers: Sequence[Optimizer]) -> int:
    values = [v for o in optimizers for state in o.state.values() for v in state.values()]
    return sum(v.nbytes for v in values if isinstance(v, Tensor))


@dataclass
class Runs:
    """The pretrained model and the texts, and the runs that begin with them; finished runs are kept
    in a folder, and read from there."""

    model: Any
    texts: finetune_text.Domains
    settings: Settings
    kept: Path
    bar: Any

    def before(self) -> list[dict[str, Any]]:
        """Scores of the model in blocks before any step, for each seed of what is added."""
        arm = next(arm for arm in ARMS if arm.trains == "layers")
        copies = [(copy.deepcopy(self.model), seed) for seed in self.settings.seeds]
        return [
            self._held_out(converted(model, arm, self.settings, seed)) for model, seed in copies
        ]

    def selection(self, arm: Arm) -> list[dict[str, Any]]:
        """A short run at each learning rate, scored on the validation modules."""
        how = self.settings
        return [self._run(arm, "validation", lr, how.selection_seed) for lr in how.rates]

    def final(self, arm: Arm, lr: float) -> list[dict[str, Any]]:
        """A run for each seed, scored on the held-out modules and on the held-out prose."""
        return [self._run(arm, "held_out", lr, seed) for seed in self.settings.seeds]

    def _run(self, arm: Arm, part: str, lr: float, seed: int) -> dict[str, Any]:
        how = self.settings
        steps = how.steps if part == "held_out" else how.selection_steps
        what = {"arm": asdict(arm), "part": part, "lr": lr, "seed": seed, "steps": steps}
        path = self.kept / f"{self._key(what)}.json"
        if path.exists():
            self.bar.update(steps)
            return read_record(path)
        self.bar.set_description(arm.name)
        network = finetune(
            self.model, arm, how, self.texts.new.training, self.bar.update,
            lr=lr, seed=seed, steps=steps,
        )  # fmt: skip
        if part == "held_out":
            found = self._held_out(network)
        else:
            found = {"new": scores(network, how, self.texts.new.validation)}
        write_record(path, {"format": FORMAT, **what, "commit": info.commit(), **found})
        return read_record(path)

    def _held_out(self, network: Any) -> dict[str, Any]:
        texts = {"new": self.texts.new.held_out, "old": self.texts.old_held_out}
        return {name: scores(network, self.settings, text) for name, text in texts.items()}

    def _key(self, what: dict[str, Any]) -> str:
        how = self.settings
        fixed = asdict(how.pretraining), how.blocks, how.batch_size, how.windows
        key = [what, fixed, self.texts.old_sha256, self.texts.new.sha256]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def measure(settings: Settings, arms: Sequence[Arm], kept: Path, rounds: int) -> dict[str, Any]:
    """The whole benchmark; what is finished is read from the folder `kept`."""
    from tqdm import tqdm

    texts = finetune_text.domains()
    how, size = settings.pretraining, texts.tokenizer.size
    per_arm = len(settings.rates) * settings.selection_steps + len(settings.seeds) * settings.steps
    # disable=None is tqdm's way of being silent where the output is not a terminal.
    with tqdm(total=how.steps + per_arm * len(arms), unit="step", disable=None) as bar:
        model = pretrained.pretrained(how, texts.old, size, kept / "pretrained.pt", bar.update)
        runs = Runs(model, texts, settings, kept, bar)
        selection, final = [], []
        for arm in arms:
            trials = runs.selection(arm)
            selection += trials
            final += runs.final(arm, best_rate(arm, trials))
    return {
        "format": FORMAT,
        "environment": timing.environment(torch.device("cpu")) | _transformers_version(),
        "settings": asdict(settings),
        "data": {
            "vocabulary": size,
            "old_sha256": texts.old_sha256,
            "new_sha256": texts.new.sha256,
            "characters": {part: getattr(texts.new, part).characters for part in PARTS},
            "unknown_characters": texts.new.unknown,
        },
        "before": runs.before(),
        "selection": selection,
        "runs": final,
        "costs": costs(model, arms, settings, rounds),
    }


def best_rate(arm: Arm, trials: Sequence[dict[str, Any]]) -> float:
    """The learning rate of the lowest validation bits."""
    name = "plain" if arm.by_plain else "block"
    return min(trials, key=lambda trial: trial["new"][name])["lr"]


def _transformers_version() -> dict[str, str]:
    import transformers

    return {"transformers": transformers.__version__}


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models.finetune", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--kept", type=Path, default=Path("runs/finetune"),
        help="the pretrained model and finished runs; delete it when code changes",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="turns of every arm that are timed")
    parser.add_argument("--out", type=Path, help="folder for the JSON and the table")
    args = parser.parse_args(argv)
    use_one_thread()
    record = measure(Settings(), ARMS, args.kept, args.rounds)
    print(finetune_report.table(record))
    if args.out:
        write_record(args.out / "finetune-cpu.json", record)
        (args.out / "finetune-cpu.md").write_text(finetune_report.page(record))
    return 0


if __name__ == "__main__":
    timing.restart_with_malloc_settings()
    sys.exit(main())
