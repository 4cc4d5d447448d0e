"""Writing text with a language model, token by token, trained in blocks or end to end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from dblocks import functional as F
from dblocks._kv_cache import KVCache, Slots
from dblocks._numbers import check_count
from dblocks.adapters._causal import ConvertedCausalLM
from dblocks.blocks import DiffusionBlocks, unwrapped
from dblocks.models._causal import LanguageModel
from dblocks.models._tokens import TokenSizes, check_tokens
from dblocks.sample import blocks_of, grid_of, levels_of

Prompts = Tensor | Sequence[Tensor] | Sequence[Sequence[int]]
MAX_SEED = 2**63 - 1


def generate(
    model: DiffusionBlocks | LanguageModel,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    num_steps: int | None = None,
    sigmas: Tensor | Sequence[float] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    stop_token: int | None = None,
    cache: bool = True,
) -> list[Tensor]:
    """The tokens that continue each prompt: what `stream` yields, collected.

    Arguments and errors are those of `stream`.

    Returns:
        For each prompt its new tokens, int64 [at most max_new_tokens], up to and with the
        `stop_token`.
    """
    steps = stream(
        model, prompts,
        max_new_tokens=max_new_tokens, num_steps=num_steps, sigmas=sigmas, temperature=temperature,
        top_k=top_k, top_p=top_p, generator=generator, stop_token=stop_token, cache=cache,
    )  # fmt: skip
    tokens = torch.stack(list(steps), dim=1)
    if stop_token is None:
        return list(tokens.unbind())
    lengths = ((tokens == stop_token).cumsum(1) == 0).sum(1) + 1
    return [row[:length] for row, length in zip(tokens, lengths.tolist(), strict=True)]


def stream(
    model: DiffusionBlocks | LanguageModel,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    num_steps: int | None = None,
    sigmas: Tensor | Sequence[float] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    stop_token: int | None = None,
    cache: bool = True,
) -> Iterator[Tensor]:
    """Yields the next token of every prompt, step after step.

    In blocks, a token comes of Euler's method from noise: every level calls the block that owns
    it, each call but the last takes the expected embedding as its estimate, and the last call's
    logits are sampled. One step, at sigma_max, runs the top block only: a next-token model of that
    block's layers.

    Each block keeps keys and values of the clean tokens in its own layers. A token's rows are added
    with that block's first call for the next token, beside the noisy row, so that a token costs
    `num_steps` calls and no more; the prelude of a `RecurrentLM` runs in each block's first only.
    A plain `RecurrentLM` keeps those of every recurrence. Without the cache all rows are computed
    at each call, with the same result but for rounding.

    A prompt's tokens depend on the generator's state, on the prompt, and on its place in the batch,
    not on the other prompts or on `max_new_tokens`, but for rounding; noise does not depend on the
    device.

    Args:
        model: the blocks of a `CausalLM` or a `RecurrentLM`, also inside torch.compile's or
            AveragedModel's wrapper, or one of these networks itself, which is the plain model. Or
            the blocks of a model that `dblocks.convert` made of another one, without a cache.
        prompts: int64 [N, P], or N of different lengths, each with at least one token.
        max_new_tokens: tokens to write for each prompt.
        num_steps: Euler steps of the equal-mass grid; the number of blocks by default. Of a plain
            `RecurrentLM` its recurrences, by default their mean in training.
        sigmas: a grid to use instead, descending.
        temperature: what logits are divided by; 0 takes the most likely token.
        top_k: keep only as many most likely tokens (and those as likely as the last of them).
        top_p: then keep only the fewest most likely tokens whose probabilities sum to at least
            this. The order is that of transformers: temperature, top_k, top_p.
        generator: a CPU generator, of which one number is drawn.
        stop_token: prompts that wrote it repeat it, and when all did, the iterator ends; that is
            looked up after every token, the only thing that synchronises with a GPU.
        cache: whether keys and values are kept.

    Yields:
        int64 [N], on the device of the model.

    Raises:
        TypeError: `model` is no language model, or tokens are not integers.
        ValueError: for prompts that are empty or, with the new tokens, longer than the context;
            for tokens outside the vocabulary; for both of `num_steps` and `sigmas`, `sigmas` with
            a plain model, or `num_steps` with one that has no steps; for a cache with a converted
            model; for other values that do not fit.
    """
    model = unwrapped(model)
    network = model.base_model if isinstance(model, DiffusionBlocks) else model
    sizes: TokenSizes
    if isinstance(network, LanguageModel):
        sizes = network.config
    elif isinstance(network, ConvertedCausalLM) and network is not model:
        sizes = network.sizes
        if cache:
            raise ValueError(
                "cache must be False for the blocks of a converted model, whose keys and values "
                "are not kept, got True; the model itself has generate() of its own"
            )
    else:
        raise TypeError(
            "model must be a CausalLM, a RecurrentLM or the DiffusionBlocks of one, "
            f"got {type(network).__name__}; see dblocks.models"
        )
    max_new_tokens = check_count("max_new_tokens", max_new_tokens)
    choice = Choice(temperature, top_k, top_p)
    if stop_token is not None and not 0 <= stop_token < sizes.vocab_size:
        raise ValueError(f"stop_token must be in 0..{sizes.vocab_size - 1}, got {stop_token}")
    device = next(network.parameters()).device
    rows = _prompt_rows(prompts, sizes.vocab_size)
    longest = max(map(len, rows))
    if longest + max_new_tokens > sizes.context:
        raise ValueError(
            "prompt and new tokens must fit in the context of "
            f"{sizes.context} tokens, got {longest} and {max_new_tokens}; shorten one"
        )
    slots = Slots([len(row) for row in rows], longest + max_new_tokens, device)
    if isinstance(model, DiffusionBlocks):
        levels = levels_of(grid_of(model, num_steps, sigmas))
        # One step is asked for as what it is, the top block alone; other grids may skip by mistake.
        blocks = [0] if num_steps == 1 else blocks_of(model, levels)
        if isinstance(network, LanguageModel):
            writer = _BlockWriter(model, levels, blocks, slots, cache=cache)
        else:
            writer = _WholeWriter(model, levels, blocks, slots)
    elif sigmas is not None:
        raise ValueError(
            f"sigmas must be None for a plain {type(network).__name__}, which has no noise levels, "
            f"got {sigmas}; leave them out"
        )
    else:
        plain = cast(LanguageModel, network)
        writer = _PlainWriter(plain, plain.plain_steps(num_steps), slots, cache=cache)
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"generator must be on the CPU, got one on {generator.device}")
    seed = int(torch.randint(MAX_SEED, (), generator=generator, device="cpu"))
    tokens = torch.zeros(len(rows), slots.capacity, dtype=torch.int64)
    for row, given in zip(tokens, rows, strict=True):
        row[: len(given)] = given
    return _steps(writer, tokens.to(device), slots, choice, seed, stop_token, sizes.context)


class Choice:
    """How a token is chosen from logits.

    Args:
        temperature: what logits are divided by; 0 takes the most likely token.
        top_k: how many tokens are kept.
        top_p: probability that the tokens that are kept must reach.
    """

    def __init__(
        self, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
    ) -> None:
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be a finite number >= 0, got {temperature}")
        if top_k is not None:
            top_k = check_count("top_k", top_k)
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}")
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p

    def probabilities(self, logits: Tensor) -> Tensor:
        """What tokens are drawn from, float64 [N, V], of logits [N, V]; temperature is not 0."""
        logits = logits.double() / self.temperature
        if self.top_k is not None:
            kth = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < kth, -math.inf)
        probabilities = logits.softmax(-1)
        if self.top_p is None:
            return probabilities
        ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
        # A token is kept if those before it do not reach top_p: the first always is.
        kept = ordered.cumsum(-1) - ordered < self.top_p
        return torch.zeros_like(ordered).scatter(-1, index, ordered * kept)

    def token(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """The token that each uniform number in (0, 1), float64 [N], picks; int64 [N]."""
        if self.temperature == 0:
            return logits.argmax(-1)
        # Of the cumulative distribution: unlike torch.multinomial, a row at a time.
        cdf = self.probabilities(logits).cumsum(-1)
        return torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0]


class _Writer(Protocol):
    """Gives the logits of the next token."""

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Rows of normals that are drawn for each prompt, and how many are in one."""
        ...

    def next_logits(self, tokens: Tensor, noise: Tensor, step: int) -> Tensor:
        """Logits [N, V] of the token after `tokens` [N, P].

        Args:
            tokens: the prompts, and what was written at the `step` steps before.
            noise: normals [N, *noise_shape]; a row is of a step, or of a position.
            step: number of the step.
        """
        ...


class _PlainWriter:
    """Logits from a plain model."""

    def __init__(self, lm: LanguageModel, num_steps: int, slots: Slots, *, cache: bool) -> None:
        self.lm = lm
        self.num_steps = num_steps
        self.slots = slots
        self.noise_shape = (slots.capacity, lm.plain_noise_width)
        self.readout = lm.current_readout()
        self.cache = self._new_cache() if cache else None

    def next_logits(self, tokens: Tensor, noise: Tensor, step: int) -> Tensor:
        """See `_Writer`; noise is of positions, as every token needs what was drawn for it."""
        cache = self.cache or self._new_cache()
        return self.lm.next_logits(
            tokens[:, cache.committed :], cache, self.readout, num_steps=self.num_steps, noise=noise
        )

    def _new_cache(self) -> KVCache:
        return self.lm.new_plain_cache(self.slots, self.num_steps)


class _BlockWriter:
    """Logits from blocks, by Euler steps."""

    def __init__(
        self,
        model: DiffusionBlocks,
        sigmas: Tensor,
        blocks: list[int],
        slots: Slots,
        *,
        cache: bool,
    ) -> None:
        self.model = model
        self.grid: list[float] = sigmas.tolist()
        self.blocks = blocks
        self.slots = slots
        self.lms = {b: cast(LanguageModel, model.parts(b)[0]) for b in set(blocks)}
        self.noise_shape = (slots.capacity - slots.prompt, self.lms[blocks[0]].config.width)
        self.readouts = {block: lm.current_readout() for block, lm in self.lms.items()}
        self.caches = {block: self._new_cache(block) for block in self.lms} if cache else None

    def next_logits(self, tokens: Tensor, noise: Tensor, step: int) -> Tensor:
        """See `_Writer`; noise is of steps."""
        noise = noise[:, step]
        z = self.grid[0] * noise[:, None]
        for i, (sigma, block) in enumerate(zip(self.grid, self.blocks, strict=True)):
            lm, readout = self.lms[block], self.readouts[block]
            cache = self._new_cache(block) if self.caches is None else self.caches[block]
            level = self.model.config.noise_schedule.level(torch.full_like(noise[:, 0], sigma))
            hidden = lm.run_cached(
                self.model.parts(block)[1], level.c_in[:, None, None] * z, level,
                tokens[:, cache.committed :], cache, readout,
            )  # fmt: skip
            logits = lm.read_out(hidden, z, level, readout)
            if i + 1 < len(self.grid):
                denoised = lm.denoise(logits, z, level, readout)
                z = F.euler_step(z, denoised, sigma, self.grid[i + 1])
        return logits[:, 0]

    def _new_cache(self, block: int) -> KVCache:
        return self.lms[block].new_cache(self.slots, self.model.parts(block)[1])


class _WholeWriter:
    """Logits from the blocks of a converted model, by Euler steps that run all rows."""

    def __init__(
        self, model: DiffusionBlocks, sigmas: Tensor, blocks: list[int], slots: Slots
    ) -> None:
        self.model = model
        self.grid: list[float] = sigmas.tolist()
        self.blocks = blocks
        self.slots = slots
        width = cast(ConvertedCausalLM, model.base_model).width
        self.noise_shape = (slots.capacity - slots.prompt, width)

    def next_logits(self, tokens: Tensor, noise: Tensor, step: int) -> Tensor:
        """See `_Writer`; noise is of steps."""
        tokens, end = self._in_rows(tokens)
        sample = torch.arange(len(tokens), device=tokens.device)
        noise = noise[:, step]
        z = self.grid[0] * noise[:, None]
        for i, (sigma, block) in enumerate(zip(self.grid, self.blocks, strict=True)):
            lm, layers = self.model.parts(block)
            level = self.model.config.noise_schedule.level(torch.full_like(noise[:, 0], sigma))
            # A noisy row feeds no other, so those that are not read may be anything.
            z_in = (level.c_in[:, None, None] * z).expand(-1, tokens.shape[1], -1)
            hidden = lm.run_layers(
                layers, z_in, level, lm.embed_condition({"tokens": tokens}, None)
            )
            hidden = hidden._replace(x=hidden.x[sample, end][:, None])
            logits = lm.read_out(hidden, z, level)
            if i + 1 < len(self.grid):
                z = F.euler_step(z, lm.denoise(logits, z, level), sigma, self.grid[i + 1])
        return logits[:, 0]

    def _in_rows(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [N, C + 1] without the gaps after short prompts, and where the next one is."""
        slots, C = self.slots, tokens.shape[1]
        lengths = torch.full((len(tokens),), C, device=tokens.device)
        tokens = torch.cat([tokens, tokens[:, :1]], dim=1)
        if slots.lengths is None:
            return tokens, lengths
        gap = (slots.prompt - slots.lengths)[:, None]
        place = torch.arange(C + 1, device=tokens.device)
        slot = torch.where(place < slots.lengths[:, None], place, place + gap)
        return tokens.gather(1, slot.clamp(max=C)), lengths - gap[:, 0]


@torch.no_grad()
def _steps(
    writer: _Writer,
    tokens: Tensor,
    slots: Slots,
    choice: Choice,
    seed: int,
    stop_token: int | None,
    context: int,
) -> Iterator[Tensor]:
    """Writes into `tokens` [N, capacity] from the end of the longest prompt on."""
    first, new = slots.prompt, slots.capacity - slots.prompt
    count, width = writer.noise_shape
    noise = _noise(len(tokens), count, context, width + 1, seed, tokens.device)
    uniform = torch.special.ndtr(noise[:, :, -1].double())
    finished = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for j in range(new):
        logits = writer.next_logits(tokens[:, : first + j], noise[:, :, :-1], j)
        token = choice.token(logits, uniform[:, j])
        if stop_token is not None:
            token = torch.where(finished, stop_token, token)
            finished = token == stop_token
        tokens[:, first + j] = token
        yield token
        if stop_token is not None and finished.all():
            return


def _noise(N: int, rows: int, context: int, width: int, seed: int, device: torch.device) -> Tensor:
    """Normals [N, rows, width] that are functions of the seed, sample, row and column."""
    zeros = torch.zeros(1, rows * width, device=device)
    one = torch.ones((), device=device)
    drawn = [F.noise_inject(zeros, one, seed, offset=n * context * width).z for n in range(N)]
    return torch.cat(cast(list[Tensor], drawn)).view(N, rows, width)


def _prompt_rows(prompts: Prompts, vocab_size: int) -> list[Tensor]:
    """The prompts as int64 tensors on the CPU, checked."""
    rows = [torch.as_tensor(prompt, device="cpu") for prompt in prompts]
    if not rows:
        raise ValueError("prompts must hold at least one prompt, got none")
    for n, row in enumerate(rows):
        if row.ndim != 1 or not len(row):
            raise ValueError(
                f"each prompt must be a row of at least one token, got shape {list(row.shape)} for "
                f"prompt {n}; begin with a token that marks the beginning of a text"
            )
        check_tokens(row[None], vocab_size)
    return rows
