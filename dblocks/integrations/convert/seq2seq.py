"""T5 models: a decoder in blocks, conditioned on the encoder's output for another text."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from dblocks.blocks import Batch
from dblocks.blocks.targets.base import missing
from dblocks.blocks.targets.padding import check_attention_mask
from dblocks.blocks.targets.token_batch import TokenBatch, check_tokens
from dblocks.integrations.convert.biased_families import UNBOUNDED, hidden_from_later
from dblocks.integrations.convert.causal_lm import ConvertedCausalLM
from dblocks.integrations.convert.families import RotaryFamily, positions_of_samples
from dblocks.integrations.convert.layers import OfLayer
from dblocks.integrations.convert.network import example_tokens
from dblocks.integrations.convert.own_attention import UMT5Attention
from dblocks.integrations.convert.row_attention import CAUSAL
from dblocks.ops._checks import values_known

READS = ("encoder_tokens", "encoder_attention_mask")


@dataclass(frozen=True)
class T5Family(RotaryFamily):
    """T5 and mT5: all layers share the bias of the first layer's scores."""

    scaled: bool = True
    """Whether rows may be scaled before the head, depending on the config."""

    def reads(self, model: Any) -> tuple[str, ...]:
        """See `RotaryFamily`."""
        return READS

    def unsupported(self, model: Any) -> str | None:
        """See `RotaryFamily`."""
        return None

    def embedding(self, model: Any) -> nn.Embedding:
        """See `CausalFamily`."""
        return model.decoder.embed_tokens

    def context_length(self, model: Any) -> int:
        """See `CausalFamily`."""
        return UNBOUNDED

    def enter(self, model: Any, rows: Tensor, positions: Tensor) -> Tensor:
        """See `CausalFamily`."""
        return model.decoder.dropout(rows)

    def leave(self, model: Any, x: Tensor) -> Tensor:
        """See `CausalFamily`."""
        config, x = model.config, model.decoder.dropout(model.decoder.final_layer_norm(x))
        # transformers 4 scales where embeddings and head are tied.
        scaled = getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)
        return x * config.d_model**-0.5 if self.scaled and scaled else x

    def cache_limit(self, model: Any) -> int | None:
        """See `CausalFamily`."""
        raise ValueError(
            f"text of a {type(model).__name__} must be written by its own generate(), since that "
            "of dblocks.sampling is given no encoder_tokens; call dm.base_model.model.generate"
        )

    def layer_context(self, model: Any, rows: Tensor) -> dict[str, Any]:
        """See `RotaryFamily`."""
        places = torch.arange(rows.shape[1], device=rows.device)
        bias = self.bias(self.table(model), places, model.config)
        return {"position_bias": bias, "encoder_hidden_states": rows.flip(1)}

    def probe_context(self, model: Any, rows: Tensor) -> dict[str, Any]:
        """`layer_context` in the form that `ConvertedSeq2Seq` passes it."""
        own = self.layer_context(model, rows)
        cross = {"key_value_states": own["encoder_hidden_states"]}
        return {"position_bias": own["position_bias"], "dblocks_cross": cross}

    def table(self, model: Any) -> nn.Embedding | None:
        """The bias of each distance, which all layers share, from the decoder's first layer."""
        return model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias

    def bias(self, table: nn.Module | None, positions: Tensor, config: Any) -> Any:
        """The bias of the scores of rows at `positions`, [1 or N, H, R, R]."""
        from transformers.models.t5.modeling_t5 import T5Attention

        table, places = cast(nn.Module, table), positions_of_samples(positions)
        bucket = T5Attention._relative_position_bucket(
            places[:, None, :] - places[:, :, None],
            bidirectional=False,
            num_buckets=config.relative_attention_num_buckets,
            max_distance=config.relative_attention_max_distance,
        )
        return table(bucket).movedim(-1, 1)

    def cross(self, states: Tensor) -> dict[str, Any]:
        """Keyword arguments of the decoder's cross-attention."""
        return {"key_value_states": states}

    def encode(self, model: Any, tokens: Tensor, mask: Tensor | None) -> dict[str, Any]:
        """The encoder's output for the decoder's layers."""
        more = {} if mask is None else {"attention_mask": mask.long()}
        states = model.encoder(input_ids=tokens, **more).last_hidden_state
        if mask is not None:
            lowest = torch.finfo(states.dtype).min
            mask = states.new_zeros(mask.shape).masked_fill(~mask, lowest)[:, None, None]
        return {**self.cross(states), "attention_mask": mask}

    def plain_logits(
        self, model: Any, tokens: Tensor, position_ids: Tensor | None = None, **more: Any
    ) -> Tensor:
        """See `CausalFamily`; `more` is the encoder's text."""
        return model(decoder_input_ids=tokens, use_cache=False, **more).logits


@dataclass(frozen=True)
class UMT5Family(T5Family):
    """UMT5: each layer has its own bias."""

    def attention(self, attention: nn.Module, name: str) -> nn.Module:
        """See `RotaryFamily`."""
        return UMT5Attention(attention, name)

    def probed(self, attention: nn.Module) -> nn.Module | None:
        """See `RotaryFamily`."""
        return UMT5Attention(attention, CAUSAL)

    def layer_context(self, model: Any, rows: Tensor) -> dict[str, Any]:
        """See `RotaryFamily`; a layer makes its own bias."""
        mask = hidden_from_later(rows)
        return {"attention_mask": mask, "encoder_hidden_states": rows.flip(1)}

    def probe_context(self, model: Any, rows: Tensor) -> dict[str, Any]:
        """See `T5Family`."""
        places = torch.arange(rows.shape[1], device=rows.device)
        cross = self.cross(rows.flip(1))
        return {"position_bias": self.bias(None, places, model.config), "dblocks_cross": cross}

    def table(self, model: Any) -> nn.Embedding | None:
        """See `T5Family`: None."""
        return None

    def bias(self, table: nn.Module | None, positions: Tensor, config: Any) -> Any:
        """See `T5Family`: each layer computes it from its own table."""
        return OfLayer(partial(self._of_layer, positions=positions, config=config))

    def cross(self, states: Tensor) -> dict[str, Any]:
        """See `T5Family`."""
        return {"encoder_hidden_states": states}

    def _of_layer(self, layer: Any, *, positions: Tensor, config: Any) -> Tensor:
        own = layer.layer[0].SelfAttention.relative_attention_bias
        return super().bias(own, positions, config)


class ConvertedSeq2Seq(ConvertedCausalLM):
    """An encoder-decoder model; the decoder's layers are divided into blocks.

    A batch holds "tokens" [N, T], the decoder's, of which the first is the model's
    `decoder_start_token_id`; "encoder_tokens" [N, S]; and may hold "encoder_attention_mask" [N, S],
    0 at padding before or after each text, and what that of a `ConvertedCausalLM` may hold, but for
    "cu_seqlens". Every block runs the encoder, which all share.

    If all layers share the bias in the decoder's first layer, this class has a copy of it, since
    other blocks must not depend on the weights of the first one.
    """

    family: T5Family  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, model: nn.Module, *arguments: Any, **options: Any) -> None:
        super().__init__(model, *arguments, **options)
        self.relative_bias = copy.deepcopy(self.family.table(model))

    def attention_of(self, given: TokenBatch, rows: Tensor, positions: Tensor) -> dict[str, Any]:
        """See `ConvertedCausalLM.attention_of`."""
        if given.cu_seqlens is not None:
            raise ValueError(
                "cu_seqlens must be None for an encoder and a decoder, since packed documents "
                "would see each other's encoder_tokens; give each document a row"
            )
        tokens, mask = self._encoder_text(given)
        config = cast(Any, self.model).config
        return {
            "position_bias": self.family.bias(self.relative_bias, positions, config),
            "dblocks_cross": self.family.encode(self.model, tokens, mask),
        }

    def example(self) -> Batch:
        """See `ConvertedCausalLM.example`; the encoder's text has padding."""
        batch = dict(super().example())
        device = batch["tokens"].device
        if (first := self._first_token()) is not None:
            batch["tokens"][:, 0] = first
        batch["encoder_tokens"] = example_tokens(self.sizes.vocab_size, (), device, 4).flip(1)
        batch["encoder_attention_mask"] = torch.arange(4, device=device) < torch.tensor(
            [[4], [3]], device=device
        )
        return batch

    def plain_entries(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """See `ConvertedCausalLM.plain_entries`."""
        tokens, mask = self._encoder_text(given)
        return {"input_ids": tokens, "attention_mask": None if mask is None else mask.long()}

    def compare(self) -> tuple[Tensor, Tensor]:
        """See `Converted.compare`; uses the model's own bias, as the copy may have been trained."""
        ours, self.relative_bias = self.relative_bias, self.family.table(self.model)
        try:
            return super().compare()
        finally:
            self.relative_bias = ours

    def _encoder_text(self, given: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        tokens, mask = given.get("encoder_tokens"), given.get("encoder_attention_mask")
        if not isinstance(tokens, Tensor):
            content = "{'tokens': [N, T], 'encoder_tokens': [N, S]}, of a decoder and its encoder"
            raise missing(given, "encoder_tokens", content)
        check_tokens(tokens, self.sizes.vocab_size)
        self._check_first(given["tokens"])
        if len(tokens) != len(given["tokens"]):
            raise ValueError(
                "encoder_tokens must have as many samples as tokens, "
                f"{len(given['tokens'])}, got {len(tokens)}"
            )
        return tokens, None if mask is None else check_attention_mask(mask, tuple(tokens.shape))

    def _first_token(self) -> int | None:
        return cast(Any, self.model).config.decoder_start_token_id

    def _check_first(self, tokens: Tensor) -> None:
        """Raises for labels as the decoder's input: the model would be one token behind."""
        first = self._first_token()
        if first is None or not tokens.numel() or not values_known(tokens):
            return
        if (tokens[:, 0] != first).any():
            raise ValueError(
                f"tokens must begin with the model's decoder_start_token_id {first}, as the "
                f"decoder's input does, got {tokens[:, 0].tolist()}; put it before each text"
            )
