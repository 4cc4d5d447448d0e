"""A recurrent-depth language model whose recurrence is the denoising of the next token.

A few layers, the core, are applied repeatedly between a prelude and a coda. In blocks the state
that they refine is the noisy embedding of the next token, so that training calls the core once, and
sampling once per Euler step. The same modules also run as a plain recurrent model (Huginn), the
baseline. `dblocks.generate` generates text with both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from dblocks import functional as F
from dblocks.blocks import Batch, TokenTarget
from dblocks.blocks.targets.entries import check_entries
from dblocks.blocks.targets.padding import from_front
from dblocks.blocks.targets.token_batch import TokenBatch, moved_to_front
from dblocks.config import check_count
from dblocks.models.doubled_rows import attend_doubled, run_doubled
from dblocks.models.language_config import LanguageModelConfig
from dblocks.models.language_model import Hidden, LanguageModel
from dblocks.nn import Attend, Norm, Rotary
from dblocks.sampling.cache import KVCache, Slots
from dblocks.schedules import NoiseLevel
from dblocks.schedules.random import check_generator, draw_seed

# Geiping et al. 2025 and the code they published
STATE_STD = math.sqrt(2 / 5)  # of the initial state, before truncation
STATE_CUT = 3.0  # standard deviations
RECURRENCE_STD = 0.5  # std of the logarithm of the Poisson rate


@dataclass(frozen=True)
class RecurrentConfig(LanguageModelConfig):
    """Sizes of a `RecurrentLM`; the defaults are a small model of characters or bytes."""

    width: int = 128
    """Width D of the rows."""
    heads: int = 2
    """Attention heads; a divisor of the width that leaves heads of even width."""
    prelude: int = 2
    """Number of layers that process the clean tokens, once."""
    core: int = 4
    """Number of layers that are applied repeatedly; these are divided into blocks."""
    coda: int = 2
    """Number of layers between the core and the output head."""
    mean_recurrence: int = 32
    """Approximate mean number of times that training of the plain model applies the core."""
    backprop_depth: int = 8
    """Number of the last recurrences through which gradients flow."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prelude", "core", "coda", "mean_recurrence", "backprop_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


class RecurrentContext(NamedTuple):
    """The context from which noisy rows are predicted."""

    x: Tensor
    """Embeddings of the clean rows, [N, T, D]; in a single stream [N, 0, D]."""
    before: Tensor
    """For each row, clean ones first, the prelude's output for the token before, [N, 2T, D], or [N,
    T, D] in a single stream; 0 for a first token."""
    rotary: Rotary
    """Rotary embeddings of these rows."""
    attend: Attend | None
    """The attention of core and coda; None for plain causal attention."""
    starts: Tensor | None
    """Where texts began that were moved to the front, int64 [N]; None without padding."""


class RecurrentLM(LanguageModel):
    """Prelude, core and coda; `DiffusionBlocks(RecurrentLM(config), BlocksConfig(1))` trains it.

    With E the embeddings, e = norm(prelude(E[tokens])), A a matrix of 2D columns, and [s; e] one
    row above the other:

    * As a denoiser, row i is for token i: `h = coda(norm(core(A [s_i; e_{i-1}])))`, where the state
      s_i is the clean embedding in clean rows, with the null conditioning, and the noisy one in
      noisy rows; both are scaled by sqrt(D)/embed_scale, so that s and e have the same size. Noisy
      row i sees the clean rows before its own and itself. A single stream has noisy rows only, with
      causal attention: e_{i-1} provides the token before. The prelude is causal, does not depend on
      noise, and runs once for any number of Euler steps: K steps are K calls of core and coda. With
      several blocks, each has some of the core's layers, and all use the prelude (in generation,
      once for each block's cache), the adapter, the norm and the coda.
    * The plain model is Huginn: from a random s, `s <- norm(core(A [s; e]))` r times, then
      `coda(s)`; row i predicts token i + 1. Training draws r from `Poisson(exp(u)) + 1` with
      `u ~ N(ln(mean_recurrence) - 1/8, 1/4)`, with mean 33 for 32; gradients flow through the last
      `backprop_depth` recurrences. The initial state is normal with variance 2/5, truncated at 3
      std, drawn from the reproducible noise of `F.noise_inject`.

    As in the original: the shape 2-4-2, the adapter, the norm after the core, the initial state,
    the recurrences and their truncation. Layers are this library's pre-norm layers instead of
    sandwich layers, which end in norms: hence the norm after the prelude. The norm after the coda
    is separate; in the original it is shared with the core. Branches are initialised with
    s/sqrt(2*l) for the l = 8 layers, not for the mean unrolled depth, 132.

    See `LanguageModel` for batches, the output head, the loss and the initialisation.

    Args:
        config: the sizes.

    Source: Geiping et al. 2025, arXiv 2502.05171; as a denoiser Shing et al. 2026.
    """

    config: RecurrentConfig
    reads = ()
    call_reads = ("tokens", "cu_seqlens", "attention_mask")

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__(config)

    def forward(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        num_recurrences: int | None = None,
        normals: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The plain model: tokens [N, T] to logits [N, T, V] of the tokens that follow, float32.

        Gradients go through the last `backprop_depth` recurrences.

        Args:
            tokens: int64 [N, T].
            cu_seqlens: boundaries of packed documents; the attention mask then has T*T elements.
            attention_mask: [N, T], 0 at padding before or after each text.
            num_recurrences: how often the core is applied; `mean_recurrence` by default.
            normals: [N, T, D], of which the initial state is made, from a text's first token on.
            generator: a CPU generator, of which one number is drawn for them otherwise.
        """
        given = {"tokens": tokens, "cu_seqlens": cu_seqlens, "attention_mask": attention_mask}
        batch, starts = moved_to_front(TokenBatch.of(given, self.config, padding=True))
        target = self.target.fixed()
        r = self.plain_steps(num_recurrences)
        shape = (*tokens.shape, self.config.width)
        if normals is None:
            normals = self._drawn(tokens, generator)
        elif normals.shape != shape:
            raise ValueError(
                f"normals must have shape [N, T, D] = {list(shape)}, got {list(normals.shape)}; "
                "draw a row for each token"
            )
        logits = target.next_logits(self._plain_features(batch, target, r, normals))
        return from_front(logits, starts)

    def next_token_loss(
        self,
        batch: Batch,
        *,
        num_recurrences: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The mean cross-entropy of the plain model over the scored tokens, 0-d, in nats.

        Args:
            batch: as for training in blocks.
            num_recurrences: how often the core is applied; drawn by default.
            generator: a CPU generator, which draws the recurrences and the seed of the state.
        """
        given, _ = moved_to_front(TokenBatch.of(batch, self.config, padding=True))
        check_entries(self, batch, self.target)
        target = self.target.fixed()
        r = self.draw_recurrences(generator) if num_recurrences is None else num_recurrences
        normals = self._drawn(given.tokens, generator)
        features = self._plain_features(given, target, self.plain_steps(r), normals)
        return target.next_loss(features, given)

    def draw_recurrences(self, generator: torch.Generator | None = None) -> int:
        """Draws how often a training step of the plain model applies the core."""
        check_generator(generator)
        mean = math.log(self.config.mean_recurrence) - RECURRENCE_STD**2 / 2
        u = torch.randn((), generator=generator, device="cpu")
        rate = (mean + RECURRENCE_STD * u).exp()
        return int(torch.poisson(rate, generator=generator)) + 1

    def embed_condition(self, batch: Batch, drop: Tensor | None = None) -> RecurrentContext:
        """Runs the prelude; see `LanguageModel.embed_condition`."""
        given, starts = self._checked(batch, drop)
        positions, T = given.positions(), given.tokens.shape[1]
        x = self._embed(given.tokens, self.target_embedding.rows())
        rotary = self._rotary(positions.repeat(2))
        causal = given.attend_causally()
        e = self._read(x, rotary.rows(0, T), [causal] * len(self.prelude))
        before = e.roll(1, 1) * (positions > 0).to(e.dtype)[:, None]
        if self.config.rows == "single":
            return RecurrentContext(x[:, :0], before, rotary.rows(0, T), causal, starts)
        doubled = attend_doubled(given.cu_seqlens)
        return RecurrentContext(x, before.repeat(1, 2, 1), rotary, doubled, starts)

    def run_layers(
        self,
        layers: Sequence[nn.Module],
        z_in: Tensor,
        level: NoiseLevel,
        condition: RecurrentContext,
    ) -> Hidden:
        """Runs layers of the core, and the coda, on the noisy rows [N, T, D]."""
        attends = [condition.attend] * (len(layers) + len(self.coda))
        cond = self._cond(level)
        z_in, inner = self._to_front(z_in, cond, condition.starts)
        noisy = self._denoised(
            layers, condition.x, z_in, condition.before, inner, condition.rotary, attends
        )
        return Hidden(from_front(noisy, condition.starts), cond)

    def new_cache(self, slots: Slots, layers: Sequence[nn.Module]) -> KVCache:
        """A cache for `run_cached`: of the prelude, these layers of the core, and the coda."""
        return KVCache(slots, len(self.prelude) + len(layers) + len(self.coda))

    def run_cached(
        self,
        layers: Sequence[nn.Module],
        z_in: Tensor,
        level: NoiseLevel,
        tokens: Tensor,
        cache: KVCache,
        table: Tensor,
    ) -> Hidden:
        """As `run_layers` for a noisy row; see `LanguageModel.run_cached`.

        The prelude runs on `tokens` only, and the cache keeps its output for the last of them.
        """
        C = tokens.shape[1]
        clean, rotary = self._embed(tokens, table), self._rotary(cache.positions(C + 1))
        e = clean
        if C > 0:
            e = self._read(clean, rotary.rows(0, C), cache.attends(C, last=len(self.prelude)))
        before, cond = cache.before(e), self._cond(level)
        rows = clean[:, :0] if self.config.rows == "single" else clean
        noisy = self._denoised(
            layers, rows, z_in, before, cond, rotary,
            cache.attends(C + 1, first=len(self.prelude)),
        )[:, -1:]  # fmt: skip
        cache.commit(C, before[:, C:])
        cond = cond[:, -1:] if cond is not None and cond.ndim == 3 else cond
        return Hidden(noisy, cond)

    @property
    def plain_noise_width(self) -> int:
        """D: normals per token, for the initial state."""
        return self.config.width

    def plain_steps(self, num_steps: int | None) -> int:
        """How often the plain model applies the core; `mean_recurrence` by default.

        Raises:
            ValueError: `num_steps` is not positive.
        """
        if num_steps is None:
            return self.config.mean_recurrence
        return check_count("number of recurrences", num_steps)

    def next_token_logits(
        self, tokens: Tensor, *, num_steps: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """As `forward`."""
        return self(tokens, num_recurrences=num_steps, generator=generator)

    def new_plain_cache(self, slots: Slots, num_steps: int) -> KVCache:
        """A cache for `next_logits`: each application of the core has its own keys and values."""
        core = num_steps * len(self.layers)
        return KVCache(slots, len(self.prelude) + core + len(self.coda))

    def next_logits(
        self, tokens: Tensor, cache: KVCache, target: TokenTarget, *,
        num_steps: int, normals: Tensor,
    ) -> Tensor:  # fmt: skip
        """The plain model's logits [N, V]; see `LanguageModel.next_logits`."""
        C = tokens.shape[1]
        positions = cache.positions(C)
        if positions.ndim == 1:
            normals = normals[:, cache.committed : cache.committed + C]
        else:
            normals = normals.gather(1, positions[..., None].expand(-1, -1, normals.shape[2]))
        attends = iter(cache.attends(C))
        x = self._recurred(
            self._embed(tokens, target.rows()), self._rotary(positions), lambda: next(attends),
            num_steps, normals,
        )  # fmt: skip
        x = cache.last_row(x)
        cache.commit(C)
        return target.next_logits(self._normed(x))[:, 0]

    def _make_layers(self) -> None:
        config = self.config
        self.prelude = self._layers_of(config.prelude, "none")
        self.prelude_norm = Norm(config.width, "none", norm="rms")
        self.adapter = nn.Linear(2 * config.width, config.width, bias=False)
        self.layers = self._layers_of(config.core, config.conditioning)
        self.core_norm = Norm(config.width, "none", norm="rms")
        self.coda = self._layers_of(config.coda, config.conditioning)

    def _read(self, x: Tensor, rotary: Rotary, attends: Sequence[Attend | None]) -> Tensor:
        """The prelude's output e."""
        for layer, attend in zip(self.prelude, attends, strict=True):
            x = layer(x, None, rotary=rotary, attend=attend)
        return self.prelude_norm.modulate(x, None, None)

    def _enter(self, state: Tensor, e: Tensor) -> Tensor:
        """The adapter."""
        return self.adapter(torch.cat([state.to(e.dtype), e], dim=-1))

    def _denoised(
        self,
        layers: Sequence[nn.Module],
        clean: Tensor,
        z_in: Tensor,
        before: Tensor,
        cond: Tensor | None,
        rotary: Rotary,
        attends: Sequence[Attend | None],
    ) -> Tensor:
        """Noisy rows [N, R, D] after core and coda.

        Args:
            layers: layers of the core.
            clean: embeddings [N, C, D].
            z_in: noisy embeddings [N, R, D].
            before: the prelude's output for the token before each row, [N, C + R, D].
            cond: conditioning of the noisy rows.
            rotary: rotary embeddings of all rows.
            attends: the attention of each layer, of core and coda.
        """
        noisy = self._noisy_rows(z_in, clean)
        if self.config.rows == "single":
            noisy, cond = self._with_level(noisy, cond)
        state = torch.cat([clean, noisy], dim=1) / self._element
        rows, n = self._enter(state, before), len(layers)
        clean, noisy = rows.split((clean.shape[1], z_in.shape[1]), dim=1)
        coda = cast(Sequence[nn.Module], self.coda)
        last = coda[-1]
        clean, noisy = run_doubled(layers, clean, noisy, cond, rotary, attends[:n], last=last)
        clean = self.core_norm.modulate(clean, None, None)
        noisy = self.core_norm.modulate(noisy, None, None)
        return run_doubled(coda, clean, noisy, cond, rotary, attends[n:], last=last)[1]

    def _plain_features(
        self, batch: TokenBatch, target: TokenTarget, num_recurrences: int, normals: Tensor
    ) -> Tensor:
        attend = batch.attend_causally()
        x = self._recurred(
            self._embed(batch.tokens, target.rows()), self._rotary(batch.positions()),
            lambda: attend, num_recurrences, normals,
        )  # fmt: skip
        return self._normed(x)

    def _recurred(
        self,
        x: Tensor,
        rotary: Rotary,
        next_attend: Callable[[], Attend | None],
        num_recurrences: int,
        normals: Tensor,
    ) -> Tensor:
        """Rows after prelude, recurrences and coda; `next_attend` gives each layer's attention."""
        e = self._read(x, rotary, [next_attend() for _ in self.prelude])
        state = initial_state(normals)
        grad = torch.is_grad_enabled()
        for step in range(num_recurrences):
            kept = step >= num_recurrences - self.config.backprop_depth
            with torch.set_grad_enabled(grad and kept):
                state = self._enter(state, e)
                for layer in self.layers:
                    state = layer(state, None, rotary=rotary, attend=next_attend())
                state = self.core_norm.modulate(state, None, None)
        for layer in self.coda:
            state = layer(state, None, rotary=rotary, attend=next_attend())
        return state

    def _drawn(self, tokens: Tensor, generator: torch.Generator | None) -> Tensor:
        """Normals [N, T, D] on the device, from a seed drawn on the CPU."""
        seed = draw_seed(generator)
        shape = (1, tokens.numel() * self.config.width)
        one = torch.ones((), device=tokens.device)
        z = F.noise_inject(torch.zeros(shape, device=tokens.device), one, seed).z
        return cast(Tensor, z).view(*tokens.shape, self.config.width)


def initial_state(normals: Tensor) -> Tensor:
    """Normals with variance 2/5, truncated at 3 std, as a function of standard normals."""
    below = math.erfc(STATE_CUT / math.sqrt(2)) / 2
    uniform = below + (1 - 2 * below) * torch.special.ndtr(normals.double())
    return (STATE_STD * torch.special.ndtri(uniform)).float()
