"""Dropout in training for transformers without dropout of their own: `--dropout`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

SEED = 733_000  # added to a run's


class Dropout:
    """Dropout as in the original ViT: on the input tokens of the first layer, the outputs of
    attention and MLP, and the attention probabilities; active only inside `at`.

    Args:
        rate: probability of dropping an element.
        blocks: the layers of each block, `TransformerLayer`s.
        seed: seed of the masks, together with the step and the process.
    """

    def __init__(self, rate: float, blocks: Sequence[Sequence[Any]], seed: int) -> None:
        self.rate, self.seed, self.active = rate, seed, False
        if not rate:
            return
        for layers in blocks:
            layers[0].register_forward_pre_hook(self._enter)
            for layer in layers:
                layer.attention.attend = partial(self._attend, layer.attention)
                layer.attention.register_forward_hook(self._leave)
                layer.mlp.register_forward_hook(self._leave)

    @contextmanager
    def at(self, step: int, device: str, mesh: Any = None) -> Iterator[None]:
        """Activates dropout inside the `with` block; PyTorch's generators are restored afterwards.

        Args:
            step: index of the step.
            device: device of the step.
            mesh: the processes that share the batch; each draws masks for its own samples.
        """
        if not self.rate:
            yield
            return
        place = torch.device(device)
        others, rank = (1, 0) if mesh is None else (mesh.size(), mesh.get_local_rank())
        with torch.random.fork_rng([] if place.type == "cpu" else [place], device_type=place.type):
            _seed(((SEED + self.seed) * 1_000_003 + step * others + rank) % 2**32, place)
            self.active = True
            try:
                yield
            finally:
                self.active = False

    def _dropped(self, x: Tensor) -> Tensor:
        return nnf.dropout(x, self.rate) if self.active else x

    def _enter(self, layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._dropped(arguments[0]), *arguments[1:])

    def _leave(self, module: nn.Module, arguments: Any, out: Tensor) -> Tensor:
        return self._dropped(out)

    def _attend(self, attention: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `Attention.attend`, with dropout."""
        return nnf.scaled_dot_product_attention(
            q, k, v, dropout_p=self.rate if self.active else 0.0, is_causal=attention.causal,
            enable_gqa=attention.num_kv_heads != attention.num_heads,
        )  # fmt: skip


def _seed(seed: int, place: torch.device) -> None:
    """Seeds the generators of the CPU and of one device; `torch.manual_seed` seeds all devices."""
    torch.default_generator.manual_seed(seed)
    if place.type == "cpu":
        return
    module = torch.get_device_module(place)
    with module.device(place):
        module.manual_seed(seed)
