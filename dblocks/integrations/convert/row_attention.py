"""Attention functions of converted language models, registered with transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from transformers import AttentionInterface

from dblocks import functional as F
from dblocks.integrations.convert.cached import Keep
from dblocks.integrations.convert.layers import ConditionedLayer
from dblocks.kernels.reference import doubled_mask

DOUBLED, CAUSAL = "dblocks_doubled", "dblocks_causal"


_OPEN: list[list[nn.Module]] = []  # of `attending`, the modules that attended so far


@contextmanager
def attending(layers: Mapping[str, ConditionedLayer]) -> Iterator[None]:
    """Raises at the end for layers whose attention did not call a function of this file.

    The forward of an attention may attend by itself. Then its noisy rows would see later clean
    ones, documents each other, and no keys would be kept, while clean rows are right.
    """
    seen: list[nn.Module] = []
    _OPEN.append(seen)
    try:
        yield
    finally:
        _OPEN.pop()
    called = {id(module) for module in seen}
    for name, layer in layers.items():
        own = layer.layer.get_submodule(layer.form.attention)
        if not called & {id(own), *map(id, layer.instead)}:
            raise ValueError(
                f"the attention of {name} must attend by the function that its config names, as "
                f"transformers' own do, but {type(own).__name__} attends by itself, so that its "
                "rows would see others than a converted model's; use the class of transformers"
            )


# Arguments that transformers passes to every attention, and their values without an effect.
WITHOUT_EFFECT = {"output_attentions": (None, False), "use_cache": (None, False, True)}


def doubled(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    dblocks_cu_seqlens: Tensor | None = None,
    dblocks_keep: Keep | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of rows `[clean | noisy]` as transformers calls it; see `F.doubled_attention`.

    The fused op has no dropout, bias or sinks; with these, PyTorch attends with a mask of (2T)^2
    elements.

    Args:
        module: the attention.
        query: [N, H, 2T, Dk].
        key: [N, Hkv, 2T, Dk].
        value: [N, Hkv, 2T, Dv].
        attention_mask: None; padding at the end is not attended to in any case.
        scaling: factor of the products of queries and keys.
        dropout: dropout rate of the attention's weights.
        is_causal: by default that of the module; must be true.
        sliding_window: number of positions that a row sees, its own included.
        softcap: bound of the scores.
        position_bias: bias of the scores, [1 or N, H, 1 or 2T, 2T].
        s_aux: sinks, see `causal`.
        dblocks_cu_seqlens: ends of packed documents.
        dblocks_keep: caches keys and values of the R rows, of any kind.
        **others: refused unless they are `None` or change nothing.

    Returns:
        [N, 2T, H, Dv], and no weights.

    Raises:
        ValueError: an argument is not supported.
    """
    _refuse(module, others | {"attention_mask": attention_mask}, is_causal, query.shape[2])
    sliding_window = sliding_window or getattr(module, "dblocks_window", None)
    # Rotary positions come in float32 under autocast, which casts the arguments of torch's own.
    query, key = query.to(value.dtype), key.to(value.dtype)
    plain = position_bias is None and s_aux is None
    added = None if plain else Added(position_bias, s_aux)
    if dblocks_keep is not None:
        key, value, mask = dblocks_keep(key, value, sliding_window)
        return _attend(query, key, value, mask, scaling, softcap, dropout, added), None
    if not dropout and added is None:
        o = F.doubled_attention(
            query, key, value, scale=scaling, cu_seqlens=dblocks_cu_seqlens,
            window=sliding_window, softcap=softcap,
        )  # fmt: skip
        return o.transpose(1, 2), None
    mask = doubled_mask(
        query.shape[2] // 2, cu_seqlens=dblocks_cu_seqlens, window=sliding_window,
        device=query.device,
    )  # fmt: skip
    return _attend(query, key, value, mask, scaling, softcap, dropout, added), None


def causal(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    dblocks_keep: Keep | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of the rows of a single stream as transformers calls it.

    Args:
        module: the attention.
        query: [N, H, R, Dk].
        key: [N, Hkv, R, Dk].
        value: [N, Hkv, R, Dv].
        attention_mask: bool [R, R], true where a row sees a key; causal by default.
        scaling: factor of the products of queries and keys.
        dropout: dropout rate of the attention's weights.
        is_causal: by default that of the module; must be true.
        sliding_window: number of positions that a row sees, its own included.
        softcap: bound of the scores.
        position_bias: bias of the scores, [1 or N, H, 1 or R, K], where K counts cached keys.
        s_aux: sinks [H], scores of one more key, whose value is zero, for all rows of a head.
        dblocks_keep: caches keys and values.
        **others: refused unless they are `None` or change nothing.

    Returns:
        [N, R, H, Dv], and no weights.

    Raises:
        ValueError: an argument is not supported.
    """
    _refuse(module, others, is_causal, query.shape[2])
    sliding_window = sliding_window or getattr(module, "dblocks_window", None)
    R, mask = query.shape[2], attention_mask
    query, key = query.to(value.dtype), key.to(value.dtype)
    plain = position_bias is None and s_aux is None
    added = None if plain else Added(position_bias, s_aux)
    if dblocks_keep is not None:
        key, value, mask = dblocks_keep(key, value, sliding_window)
    elif sliding_window is not None and sliding_window < R:
        row = torch.arange(R, device=query.device)
        near = row[:, None] - row < sliding_window
        mask = near & ((row[:, None] >= row) if mask is None else mask)
    return _attend(query, key, value, mask, scaling, softcap, dropout, added), None


class Added(NamedTuple):
    """Additions to the attention scores of a model."""

    bias: Tensor | None
    """Bias of the scores, [1 or N, H, 1 or R, K]."""
    sinks: Tensor | None
    """Scores [H] of one more key, whose value is zero."""

    def to_mask(self, mask: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sum as a mask of scores, with keys and values; sinks need one more of each."""
        bias = mask.new_zeros(1, 1, 1, 1, dtype=value.dtype) if self.bias is None else self.bias
        # On CPUs PyTorch reads a mask of float32 wrongly beside float64.
        bias = bias.to(torch.promote_types(bias.dtype, value.dtype))
        mask = torch.where(mask, bias, float("-inf"))
        if self.sinks is None:
            return mask, key, value
        sinks = self.sinks.to(mask.dtype)[:, None, None]
        N, H, (R, K) = mask.shape[0], len(sinks), mask.shape[2:]
        mask = torch.cat([mask.expand(N, H, R, K), sinks.expand(N, H, R, 1)], dim=-1)
        # A key of zeros has the score 0, to which its sink is added.
        return mask, nnf.pad(key, (0, 0, 0, 1)), nnf.pad(value, (0, 0, 0, 1))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None,
    softcap: float | None, dropout: float, added: Added | None = None,
) -> Tensor:  # fmt: skip
    """Attention under a mask: [N, R, H, Dv].

    Without a mask, a single row sees all keys, and several rows are causal.
    """
    R = query.shape[2]
    if mask is None and (softcap is not None or added is not None):
        mask = torch.ones(R, key.shape[2], dtype=torch.bool, device=query.device)
        mask = mask if R == 1 else mask.tril()
    if added is not None:
        mask, key, value = added.to_mask(cast(Tensor, mask), key, value)
    if softcap is not None:
        o = _capped(query, key, value, cast(Tensor, mask), scaling, softcap, dropout)
    else:
        o = nnf.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None and R > 1,
            dropout_p=dropout, scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
    return o.transpose(1, 2)


def _capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None,
    softcap: float, dropout: float,
) -> Tensor:  # fmt: skip
    """Attention with bounded scores, which PyTorch does not offer."""
    each = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(each, 1), value.repeat_interleave(each, 1)
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = factor * query @ key.transpose(-1, -2)
    scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1, dtype=torch.float32)
    return nnf.dropout(weights.to(value.dtype), dropout) @ value


def _refuse(
    module: nn.Module, others: Mapping[str, Any], is_causal: bool | None, rows: int
) -> None:
    for seen in _OPEN:
        seen.append(module)
    # GPT-2 of transformers 4 says of a single row that it sees all keys, which is the same.
    is_causal = None if rows == 1 else is_causal
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    unread = [
        name
        for name, value in others.items()
        if not any(value is allowed for allowed in WITHOUT_EFFECT.get(name, (None,)))
    ]
    if not causal:
        unread.append("is_causal=False")
    if unread:
        raise ValueError(
            "the attention of converted models does not do what "
            f"{type(module).__name__} asks for with {', '.join(sorted(unread))}; "
            "a model that needs it cannot be converted"
        )


# When this module is imported, so that a pickled model finds them where it is loaded.
AttentionInterface.register(DOUBLED, doubled)
AttentionInterface.register(CAUSAL, causal)
