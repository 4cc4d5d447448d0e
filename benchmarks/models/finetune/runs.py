"""The runs of every arm, their learning rates, and the record of the whole benchmark."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.models.finetune import pretrained
from benchmarks.models.finetune import text as finetune_text
from benchmarks.models.finetune.arms import ARMS, Arm, Settings, converted, finetune
from benchmarks.models.finetune.costs import costs
from benchmarks.models.finetune.scores import scores
from benchmarks.ops import timing
from dblocks import info
from dblocks.recipes.records import read_record, write_record

FORMAT = 1
PARTS = ("training", "validation", "held_out")


@dataclass
class Runs:
    """The pretrained model, the texts, and the runs of fine-tuning; finished runs are stored in a
    folder and read from there."""

    model: Any
    texts: finetune_text.Domains
    settings: Settings
    kept: Path
    bar: Any

    def before(self) -> list[dict[str, Any]]:
        """Scores of the model in blocks before training, for each seed of the added parameters."""
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
        """One run per seed, scored on the held-out modules and on the held-out prose."""
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
    """Runs the whole benchmark; finished runs are read from the folder `kept`."""
    from tqdm import tqdm

    texts = finetune_text.domains()
    how, size = settings.pretraining, texts.tokenizer.size
    per_arm = len(settings.rates) * settings.selection_steps + len(settings.seeds) * settings.steps
    # disable=None disables the bar if the output is not a terminal.
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
    """The learning rate with the lowest validation bits."""
    name = "plain" if arm.by_plain else "block"
    return min(trials, key=lambda trial: trial["new"][name])["lr"]


def _transformers_version() -> dict[str, str]:
    import transformers

    return {"transformers": transformers.__version__}
