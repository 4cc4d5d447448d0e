"""Doubled attention in plain PyTorch, a dense mask: a part of the reference.

A NaN times the probability 0 is NaN, forward and backward. So that a document of a packed sequence,
or what is valid of a sample, does not depend on other rows, it is computed without them: out of its
own rows where the limits can be read, else with zeros in place of the others.
"""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

Attend = Callable[..., tuple[Tensor, Tensor]]


def doubled_mask(
    T: int,
    *,
    block_size: int = 1,
    clean_causal: str = "block",
    order: str = "clean_noisy",
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    valid: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Which keys a row of the doubled sequence attends to: bool [2T, 2T], [N, 2T, 2T] with `valid`.

    Rows and keys stand in the given order.
    """
    position = torch.arange(T, device=device).repeat(2)
    document = inside = torch.zeros_like(position)
    noisy = torch.arange(2 * T, device=device) >= T
    if order == "noisy_clean":
        noisy = ~noisy
    if cu_seqlens is not None:
        ends = cu_seqlens[1:].to(position.dtype).contiguous()
        document = torch.searchsorted(ends, position, right=True)
        position = position - cu_seqlens.to(position.dtype)[document]
    if valid is not None:
        inside = _members(T, None, valid)[0]
        position = position - valid[:, :1].to(position.dtype)
    block = position.div(block_size, rounding_mode="floor")
    i, block_i, document_i, noisy_i = (x.unsqueeze(-1) for x in (position, block, document, noisy))
    j, block_j, document_j, noisy_j = (x.unsqueeze(-2) for x in (position, block, document, noisy))
    own, earlier = block_i == block_j, block_i > block_j
    within = own if clean_causal == "block" else i >= j
    seen = torch.where(noisy_j, noisy_i & own, earlier | (~noisy_i & within))
    seen = seen & (document_i == document_j)
    if valid is not None:
        seen = seen & inside.unsqueeze(-1) & inside.unsqueeze(-2)
    return seen if window is None else seen & (i - j < window)


def doubled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int = 1,
    clean_causal: str = "block",
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    query: str = "both",
    order: str = "clean_noisy",
    valid: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Also returns the natural logarithm of the sums of exponentials, [N, H, rows of q].

    It is -inf for rows outside of `valid`.
    """
    dtype, T = torch.promote_types(q.dtype, torch.float32), k.shape[2] // 2
    first = T if query == "noisy" and order == "clean_noisy" else 0
    rows = slice(first, first + q.shape[2])  # those of q among all 2T
    mask = doubled_mask(
        T,
        block_size=block_size,
        clean_causal=clean_causal,
        order=order,
        window=window,
        cu_seqlens=cu_seqlens,
        valid=valid,
        device=q.device,
    )
    mask, bias = mask[..., rows, :].unsqueeze(-3), None
    if alibi_slopes is not None:
        position = torch.arange(T, device=q.device).repeat(2)
        distance = (position[rows, None] - position).abs()
        bias = -alibi_slopes.to(dtype)[..., None, None] * distance
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def attend(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # Each key/value head serves the next H / Hkv query heads.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores if bias is None else scores + bias
        scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1) @ v, scores.logsumexp(-1)

    inputs = [x.to(dtype) for x in (q, k, v)]
    can_autocast = torch.amp.is_autocast_available(q.device.type)
    # Products keep the dtypes of their operands.
    with torch.autocast(q.device.type, enabled=False) if can_autocast else nullcontext():
        if valid is None and cu_seqlens is None:
            o, lse = attend(*inputs, mask, bias)
        elif cu_seqlens is not None and _is_readable(cu_seqlens):
            o, lse = _by_slices(attend, *inputs, mask, bias, cu_seqlens.tolist())
        else:
            o, lse = _by_zeros(attend, *inputs, mask, bias, rows, _members(T, cu_seqlens, valid))
    return o.to(q.dtype), lse


def _is_readable(x: Tensor) -> bool:
    """Whether the values can be had, without waiting for a GPU and outside of traced code."""
    if torch.compiler.is_compiling() or is_functorch_wrapped_tensor(x):
        return False
    if _get_current_dispatch_mode() is not None or torch._C._get_tracing_state() is not None:
        return False
    return x.is_cpu and type(x) is Tensor


def _by_slices(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    ends: list[int],
) -> tuple[Tensor, Tensor]:
    """Each document out of its own rows."""
    T = ends[-1]
    o, lse = q.new_zeros(*q.shape[:3], v.shape[-1]), q.new_zeros(q.shape[:3])
    for start, end in pairwise(ends):
        keys = torch.cat([torch.arange(start, end), torch.arange(T + start, T + end)])
        at = keys if q.shape[2] == 2 * T else keys[: end - start]
        own, own_bias = (x if x is None else x[..., at, :][..., keys] for x in (mask, bias))
        part, part_lse = attend(q[:, :, at], k[:, :, keys], v[:, :, keys], own, own_bias)
        o, lse = o.index_copy(2, at, part), lse.index_copy(2, at, part_lse)
    return o, lse


def _members(T: int, cu_seqlens: Tensor | None, valid: Tensor | None) -> list[Tensor]:
    """Which of the 2T rows each document has, or each sample of `valid`: bool [2T] or [N, 2T]."""
    limits = valid.unsqueeze(-1) if valid is not None else cu_seqlens
    position = torch.arange(T, device=limits.device).repeat(2)
    if valid is not None:
        return [(position >= limits[:, 0]) & (position < limits[:, 1])]
    return [
        (position >= limits[i]) & (position < limits[i + 1]) for i in range(limits.shape[0] - 1)
    ]


def _by_zeros(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    rows: slice,
    members: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Each of the `members` with zeros in place of all other rows."""
    o, lse = 0.0, -torch.inf
    for member in members:
        keys = member[..., None, :, None]
        own = keys[..., rows, :]
        # Other rows see everything, which is all zeros and keeps them finite.
        part, part_lse = attend(
            q.where(own, 0), k.where(keys, 0), v.where(keys, 0), mask | ~own, bias
        )
        o, lse = part.where(own, o), part_lse.where(own.squeeze(-1), lse)
    return o, lse
