"""The small pretrained model of the fine-tuning benchmark, trained once and cached."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.optim import Optimizer

from dblocks.checkpoint import replacing
from dblocks.recipes.data.text import Text
from dblocks.recipes.data.windows import random_windows, scored_windows

WARMUP = 0.05  # fraction of the steps in which the learning rate rises
CLIP = 1.0
WEIGHT_DECAY = 0.05


@dataclass(frozen=True)
class Pretraining:
    """The model, a Llama with tied embeddings, and its training."""

    width: int = 128
    layers: int = 6
    heads: int = 4
    context: int = 128
    steps: int = 1400
    batch_size: int = 4
    lr: float = 2e-3
    seed: int = 0


def llama(how: Pretraining, vocab_size: int) -> Any:
    """The model with random weights from `how.seed`.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=how.width,
        intermediate_size=8 * how.width // 3,
        num_hidden_layers=how.layers,
        num_attention_heads=how.heads,
        num_key_value_heads=how.heads,
        max_position_embeddings=how.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        return LlamaForCausalLM(config)


def pretrained(
    how: Pretraining, text: Text, vocab_size: int, file: Path, each: Callable[[], object]
) -> Any:
    """The trained model, loaded from `file` if it exists; `each` is called after each step."""
    model = llama(how, vocab_size)
    if file.exists():
        saved = torch.load(file, weights_only=True)
        if saved["how"] == asdict(how):
            model.load_state_dict(saved["model"])
            return model
    optimizer = adamw(model.parameters(), how.lr)
    for step in range(how.steps):
        set_rate(optimizer, rate_at(step, how.steps, how.lr))
        plain_step(model, optimizer, windows_of(text, how, how.batch_size, how.seed, step))
        each()
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as part:
        torch.save({"how": asdict(how), "model": model.state_dict()}, part)
    return model


def windows_of(text: Text, how: Pretraining, batch_size: int, seed: int, step: int) -> Tensor:
    """Batch number `step`."""
    return random_windows(text.tokens, how.context, batch_size, seed=seed, step=step)


def plain_loss(model: Any, tokens: Tensor) -> Tensor:
    """The mean cross-entropy of the next token."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return nnf.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def plain_step(model: Any, optimizer: Optimizer, tokens: Tensor) -> None:
    """An ordinary step of the whole model."""
    plain_loss(model, tokens).backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    model.zero_grad(set_to_none=True)


def adamw(parameters: Any, lr: float) -> Optimizer:
    """AdamW with weight decay for matrices only."""
    several = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in several if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in several if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def rate_at(step: int, steps: int, lr: float) -> float:
    """A linear rise, then a cosine to 0."""
    rise = max(1, round(WARMUP * steps))
    if step < rise:
        return lr * (step + 1) / rise
    return lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def set_rate(optimizer: Optimizer, lr: float) -> None:
    """Sets the learning rate of an optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def plain_bits(model: Any, text: Text, context: int, windows: int | None) -> float:
    """Bits per character of a text under the plain model, with half a window of context or more."""
    nats, count = 0.0, 0
    for tokens, scored in scored_windows(text.tokens, context, 16, windows=windows):
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].transpose(1, 2)
        losses = nnf.cross_entropy(logits, tokens[:, 1:], reduction="none")
        nats += losses[scored[:, 1:]].double().sum().item()
        count += int(scored[:, 1:].sum())
    return nats / count / math.log(2)
