"""A converted causal language model: a single stream of rows, or doubled rows as in `CausalLM`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dblocks.blocks import Batch, Features, OutputHead, TokenTarget
from dblocks.blocks.targets.classes import Head
from dblocks.blocks.targets.entries import checked
from dblocks.blocks.targets.padding import from_front, starts_of, to_front
from dblocks.blocks.targets.token_batch import TokenBatch, moved_to_front
from dblocks.integrations.convert.cached import RowCache
from dblocks.integrations.convert.choices import choosing_alike, largest_rounding
from dblocks.integrations.convert.layers import ConditionedLayer, cond_dim
from dblocks.integrations.convert.network import Converted, Sizes, check_some, example_tokens
from dblocks.integrations.convert.places import (
    before_each,
    document_mask,
    element_size,
    placed,
    places_of,
)
from dblocks.integrations.convert.scaled_rows import ScaledRows
from dblocks.nn import Modulation, over_rows
from dblocks.nn.scalars import number
from dblocks.sampling.cache import Slots
from dblocks.schedules import NoiseLevel

NOISE_SCALE = 0.1  # as that of CausalLM

Rows = Literal["single", "doubled"]


class CausalFamily(Protocol):
    """The differences between models that predict the next token."""

    def reads(self, model: nn.Module) -> tuple[str, ...]:
        """Entries of a batch that are read in addition to tokens."""
        ...

    def embedding(self, model: nn.Module) -> nn.Embedding:
        """The embedding of tokens."""
        ...

    def head(self, model: nn.Module) -> nn.Linear:
        """The output head."""
        ...

    def softcap(self, model: nn.Module) -> float | None:
        """Bound of the logits."""
        ...

    def context_length(self, model: nn.Module) -> int:
        """The longest sequence that the model takes."""
        ...

    def enter(self, model: nn.Module, rows: Tensor, positions: Tensor) -> Tensor:
        """Token embeddings [N, T, D], as they enter the first layer."""
        ...

    def context(
        self, model: nn.Module, rows: Tensor, positions: Tensor, keys: Tensor | None = None
    ) -> dict[str, Any]:
        """Keyword arguments of the layers' attention, for rows at positions [T] or [N, T].

        `keys`, [K] or [N, K], are the positions of the rows that may be seen, by default the same.
        """
        ...

    def cache_limit(self, model: nn.Module) -> int | None:
        """Number of tokens beyond which all keys and values of a text change; None: never.

        Raises:
            ValueError: they cannot be cached.
        """
        ...

    def leave(self, model: nn.Module, x: Tensor) -> Tensor:
        """The output of the layers, normalised for the head."""
        ...

    def plain_logits(
        self, model: nn.Module, tokens: Tensor, position_ids: Tensor | None = None, **more: Any
    ) -> Tensor:
        """The model's own logits [N, T, V]."""
        ...

    def plain_loss(
        self,
        model: nn.Module,
        tokens: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        """The mean cross-entropy of `labels` [N, T], the tokens or `IGNORED`, 0-d."""
        ...


class Context(NamedTuple):
    """The context from which noisy rows are predicted."""

    clean: Tensor | None
    """Clean rows [N, T, D], as they enter the layers; None in a single stream."""
    noisy: Tensor
    """The rows that noisy embeddings are added to, [N, T, D]; [N, T - 1, D] in a single stream."""
    attention: Mapping[str, Any]
    """Keyword arguments of the attention."""
    starts: Tensor | None = None
    """Start of each text before its rows were moved to the front, int64 [N]; None: no padding."""


class Hidden(NamedTuple):
    """The output of the layers."""

    x: Tensor
    """Noisy rows [N, T, D]; in a single stream the row of the first token is zero."""
    cond: Tensor
    """Their conditioning vectors."""


class ConvertedCausalLM(Converted):
    """A model of the next token, for `DiffusionBlocks` with a `NoiseSchedule`.

    The target of a position is its token's embedding at norm `embed_scale`. The noisy row of a
    position enters as the embedding of the token before it, plus a learned number times the scaled
    noisy embedding, at that token's position: it is where the model predicts this token, so that a
    pretrained model starts from its own predictions.

    `rows="single"`: there are no other rows, and attention is causal. That learned number is 0 at
    the start, so that, with modulations of zero, rows are exactly those of the plain model.
    Earlier rows hold noise about tokens that a row knows anyway. The first token, which is never
    scored, has no row.

    `rows="doubled"`: clean rows run beside them through the layers as they do in the model, without
    a modulation; noisy rows see the clean ones before them.

    With h the layers' noisy rows, E the targets, and the model's own norm and head,

        posterior   logits = head(norm(h)) + E z / sigma^2
        learned     logits = head(g*(m*(1 + scale) + shift)),   m = c_skip*z + c_out*norm(h)

    The first is Bayes' rule, in float32: what the layers have to give is ln p(token | text), as
    the model itself does. In the second, g is a learned number, 1/sigma_data at the start: at the
    highest noise the head sees norm(h).

    A batch holds "tokens", and may hold "loss_mask" and "cu_seqlens", as that of `CausalLM`; or
    "attention_mask" [N, T], 0 at padding before or after each text, which changes nothing for the
    text: positions count from its first token. "position_ids" [N, T] are used in their place, where
    the model has them.

    Args:
        model: the user's model.
        layers: `ConditionedLayer`s by name, with the attention for these rows.
        family: the model's family.
        sigma_data: standard deviation of the data, from the schedule.
        embed_scale: norm of the target embedding of a token.
        tokens_per_sigma: number of consecutive tokens that share a noise level; None: all of a
            sequence.
        rows_kind: how noisy embeddings enter.
        head_kind: form of the logits, as `head` of `convert`.
    """

    block_size = 1  # tokens that are predicted at once
    runs_whole = True  # without a cache, as in training

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, ConditionedLayer],
        family: CausalFamily,
        *,
        sigma_data: float,
        embed_scale: float,
        tokens_per_sigma: int | None,
        rows_kind: Rows,
        head_kind: Head,
    ) -> None:
        embedding = family.embedding(model)
        width = embedding.embedding_dim
        super().__init__(model, layers, width, conditioned=True)
        self.family = family
        self.reads = family.reads(model)
        self.call_reads = ("tokens", "cu_seqlens", "attention_mask", *self.reads)
        self.embed_scale = embed_scale
        self.tokens_per_sigma = tokens_per_sigma
        self.rows_kind: Rows = rows_kind
        self.head_kind: Head = head_kind
        start = 0.0 if rows_kind == "single" else NOISE_SCALE * element_size(embedding.weight)
        self.noise_scale = number(start)
        self.head_modulation = self.log_scale = None
        if head_kind == "learned":
            self.head_modulation = Modulation(width, 2, cond_dim=cond_dim(width))
            self.log_scale = number(-math.log(sigma_data))
        self.added_to_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Layers refer to attention functions by name; unpickling must register them.
        import_module("dblocks.integrations.convert.row_attention")
        super().__setstate__(state)

    @property
    def sizes(self) -> Sizes:
        """Those of the model by now, whose embedding may have been resized."""
        embedding = self.family.embedding(self.model)
        return Sizes(embedding.num_embeddings, self.family.context_length(self.model))

    @property
    def target(self) -> TokenTarget:
        """The model's own embedding of each token, at norm `embed_scale`."""
        embedding = ScaledRows(self.family.embedding(self.model), self.embed_scale)
        head = OutputHead(
            self.family.head(self.model), modulation=self.head_modulation, log_scale=self.log_scale
        )
        return TokenTarget(
            embedding, head, self.sizes, head=self.head_kind,
            tokens_per_sigma=self.tokens_per_sigma, softcap=self.family.softcap(self.model),
            padding=True,
        )  # fmt: skip

    def embed_condition(self, batch: Batch, drop: Tensor | None = None) -> Context:
        """The rows before each token, and with doubled rows the clean rows."""
        if drop is not None:
            raise ValueError(
                "a language model is not trained without its condition, so guidance_scale must be 1"
            )
        given = self.target.check(batch)
        check_some(given.tokens)
        given, starts = moved_to_front(placed(given, self.sizes.context))
        embed = self._single if self.rows_kind == "single" else self._doubled
        return embed(given, places_of(given))._replace(starts=starts)

    def _single(self, given: TokenBatch, places: Tensor) -> Context:
        if given.tokens.shape[1] < 2:
            raise ValueError(
                "tokens must be at least 2 long in a single stream, whose first token is given, "
                f"got {given.tokens.shape[1]}; leave such texts out"
            )
        first = given.positions() == 0
        before, first = before_each(places, first)[..., 1:], first[1:]
        embedded = cast(Tensor, self.family.embedding(self.model)(given.tokens[:, :-1]))
        attention = self.attention_of(given, embedded, before)
        if given.cu_seqlens is not None:
            embedded = embedded.masked_fill(first[:, None], 0)
            attention["attention_mask"] = document_mask(first)
        return Context(None, self.family.enter(self.model, embedded, before), attention)

    def _doubled(self, given: TokenBatch, places: Tensor) -> Context:
        first = given.positions() == 0
        before = before_each(places, first)
        embedded = cast(Tensor, self.family.embedding(self.model)(given.tokens))
        previous = embedded.roll(1, dims=1).masked_fill(first[:, None], 0)
        attention = self.attention_of(given, embedded, torch.cat([places, before], -1))
        if given.cu_seqlens is not None:
            attention["dblocks_cu_seqlens"] = given.cu_seqlens
        return Context(
            self.family.enter(self.model, embedded, places),
            self.family.enter(self.model, previous, before),
            attention,
        )

    def attention_of(self, given: TokenBatch, rows: Tensor, positions: Tensor) -> dict[str, Any]:
        """Keyword arguments of the layers' attention; see `CausalFamily.context`."""
        return self.family.context(self.model, rows, positions)

    def example(self) -> Batch:
        """A small batch for a trial run."""
        weight = self.family.embedding(self.model).weight
        tokens = example_tokens(self.sizes.vocab_size, (), weight.device)
        return {"tokens": tokens[:, : self.sizes.context]}

    def plain_entries(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments of the model's own forward in addition to tokens and positions."""
        return {}

    def run_layers(
        self, layers: Sequence[nn.Module], z_in: Tensor, level: NoiseLevel, condition: Context
    ) -> Hidden:
        """Runs `layers` on the noisy embeddings [N, T, D], with clean rows if rows are doubled."""
        cond = inner = cast(Tensor, self._cond(level))
        starts = condition.starts
        if inner.ndim == 3 and starts is not None:
            inner = to_front(over_rows(inner, z_in), starts)
        z_in = to_front(z_in, starts)
        if condition.clean is None:
            noise = z_in[:, 1:]
            if inner.ndim == 3:
                inner = over_rows(inner, z_in)[:, 1:]
            x = condition.noisy + (self.noise_scale * noise).to(condition.noisy.dtype)
            for layer in layers:
                x = layer(x, inner, condition.attention, checkpointing=self.checkpointing)
            return Hidden(from_front(nnf.pad(x, (0, 0, 1, 0)), starts), cond)
        # One level per segment, also for a single one: clean rows are a segment too.
        segments = inner if inner.ndim == 3 else inner[:, None]
        noisy = condition.noisy + (self.noise_scale * z_in).to(condition.noisy.dtype)
        x = torch.cat([condition.clean, noisy], dim=1)
        for layer in layers:
            x = layer(
                x, segments, condition.attention,
                clean=segments.shape[1], checkpointing=self.checkpointing,
            )  # fmt: skip
        return Hidden(from_front(x[:, x.shape[1] // 2 :], starts), cond)

    def new_cache(self, slots: Slots, layers: Sequence[nn.Module]) -> RowCache:
        """A cache for `run_cached` with these layers.

        Raises:
            ValueError: keys and values of this model cannot be cached.
        """
        limit, start = self.family.cache_limit(self.model), int(self.rows_kind == "single")
        return RowCache(slots, len(layers), start=start, limit=limit)

    def run_cached(
        self,
        layers: Sequence[nn.Module],
        z_in: Tensor,
        level: NoiseLevel,
        tokens: Tensor,
        cache: RowCache,
        table: Tensor,
    ) -> Hidden:
        """As `run_layers` for some noisy rows; see `LanguageModel.run_cached`."""
        C, last = tokens.shape[1], cache.committed + tokens.shape[1] + 1
        cond, clean = cast(Tensor, self._cond(level)), C
        at = cache.slots.positions(cache.first, last)
        R = at.shape[-1]
        rows = cast(Tensor, self.family.embedding(self.model)(tokens))
        before = cache.before(rows)
        # A noisy row has the position of the token before it.
        if self.rows_kind == "single":
            rows, at, cond, z_in, clean = before[:, -R:], at - 1, cond[:, -R:], z_in[:, -R:], 0
            inner = cond
        else:
            rows, inner = torch.cat([rows, before[:, C:]], dim=1), cond[:, None]
            at = torch.cat([at[..., :C], at[..., C:] - 1], dim=-1)
        x = self.family.enter(self.model, rows, at)
        noise = (self.noise_scale * z_in).to(x.dtype)
        x = torch.cat([x[:, :clean], x[:, clean:] + noise], dim=1)
        attention = self.family.context(self.model, rows, at, cache.kept_positions(last))
        for layer, keep in zip(layers, cache.keeps(last), strict=True):
            x = layer(x, inner, {**attention, "dblocks_keep": keep}, clean=clean)
        cache.commit(C, before[:, C:])
        return Hidden(x[:, -1:], cond[:, -1:] if cond.ndim == 3 else cond)

    def read_as_weights(self) -> tuple[nn.Module, ...]:
        """See `Converted.read_as_weights`."""
        return self.family.embedding(self.model), self.family.head(self.model)

    def features(self, hidden: Hidden) -> Features:
        """The noisy rows, normalised for the head, [N, T, D]."""
        return Features(self.family.leave(self.model, hidden.x), hidden.cond)

    def compare(self) -> tuple[Tensor, Tensor]:
        """See `Converted.compare`; compares the clean rows, the only ones without noise."""
        batch = self.example()
        tokens = batch["tokens"]
        more = self.plain_entries(batch)
        rows = import_module("dblocks.integrations.convert.row_attention")
        with rows.attending(dict(zip(self.names, self.layers, strict=True))):
            own, ours = choosing_alike(
                lambda: self.family.plain_logits(self.model, tokens, **more),
                lambda: self._clean_logits(batch),
                len(tokens),
                largest_rounding(next(self.layers.parameters()).dtype, layers=len(self.names)),
            )
        return own[:, : ours.shape[1]], ours

    def _clean_logits(self, batch: Batch) -> Tensor:
        condition = self.embed_condition(batch)
        x = condition.noisy
        if condition.clean is not None:
            x = torch.cat([condition.clean, x], dim=1)
        for layer in self.layers:
            x = layer(x, None, condition.attention)
        if condition.clean is not None:
            x = x[:, : condition.clean.shape[1]]
        rows = self.family.leave(self.model, x)
        logits, cap = self.family.head(self.model)(rows), self.family.softcap(self.model)
        return logits if cap is None else cap * (logits / cap).tanh()

    def plain_loss(self, batch: Batch, z: Tensor | None = None) -> Tensor:
        """The model's own mean cross-entropy over the tokens that are scored, in nats."""
        given = cast(TokenBatch, checked(self, batch, self.target))
        if given.cu_seqlens is not None:
            raise ValueError(
                "the model's own loss does not keep packed documents apart, so a batch must not "
                "hold 'cu_seqlens'; give each document a row, or set clean_loss_weight to 0"
            )
        labels = to_front(given.labels(), starts_of(given.attention_mask))
        given, _ = moved_to_front(placed(given, self.sizes.context))
        ids = given.get("position_ids")
        more = self.plain_entries(given)
        return self.family.plain_loss(self.model, given.tokens, labels, ids, **more)
