"""The bias of the scores of a chunk of positions: a mask, and with slopes the ALiBi term.

Masks depend on a few integers, and small ones are cached.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from dblocks.ops._attention.pieces import Options, Piece

NEGLIGIBLE = 40.0  # e^-40 is 4e-18, far below the rounding of float32
NORMAL = 64.0  # e^-64 times the probability of a row itself is a normal number of float32
KEPT_MASKS, KEPT_PAIRS = 16, 2**18  # at most 16 MiB of float32, and as much of distances


def _slopes(piece: Piece, slopes: Tensor) -> Tensor:
    """[1 or N, H]"""
    return slopes[piece.samples] if slopes.ndim == 2 else slopes.unsqueeze(0)


def least_bias(piece: Piece, options: Options, q: Tensor, k: Tensor) -> float:
    """Below this, a key's probability is less than e^-NEGLIGIBLE of that of the row itself.

    Products with numbers too small for float32's exponent take a hundred times as long as others.
    """
    if options.alibi_slopes is None or q.dtype == torch.float64:
        return -math.inf
    farthest = max(min(options.window or piece.length, piece.length), piece.block_size)
    if _slopes(piece, options.alibi_slopes).max().item() * farthest <= NORMAL:
        return -math.inf
    if options.softcap is not None:
        return -2 * options.softcap - NEGLIGIBLE
    largest = [
        torch.stack([x[:, :, rows].norm(dim=-1).amax() for rows in parts if rows is not None])
        for x, parts in ((q, (piece.q_clean, piece.q_noisy)), (k, (piece.clean, piece.noisy)))
    ]
    return (largest[0].amax() * largest[1].amax() * (-2 * options.scale) - NEGLIGIBLE).item()


def bias(
    length: int, back: int, piece: Piece, options: Options, dtype: torch.dtype, least: float
) -> Tensor:
    """[rows, keys], or [1, H, rows, keys] with slopes; -inf where a row does not see a key."""
    both = piece.q_clean is not None
    pairs = (1 + both) * length * (back + 2 * length)
    make = _mask if pairs <= KEPT_PAIRS else _mask.__wrapped__
    mask, distance = make(
        length, back, both, piece.block_size, options.token, options.noisy_first,
        options.window, options.alibi_slopes is not None, dtype,
    )  # fmt: skip
    if options.alibi_slopes is None:
        return mask
    slopes = _slopes(piece, options.alibi_slopes).to(dtype)
    biased = torch.addcmul(mask, distance, -slopes[..., None, None])
    return torch.threshold_(biased, least, -torch.inf) if math.isfinite(least) else biased


@lru_cache(KEPT_MASKS)
def _mask(
    length: int,
    back: int,
    both: bool,
    block_size: int,
    token: bool,
    noisy_first: bool,
    window: int | None,
    with_distance: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """0 or -inf, and how far apart rows and keys are if wanted; nobody writes to them."""
    positions = torch.arange(-back, length, device="cpu")
    clean, noisy = positions, positions[back:]
    rows = noisy.repeat(2) if both else noisy
    is_noisy = (torch.arange(len(rows), device="cpu") < length) == (noisy_first or not both)
    block = rows // block_size * block_size
    block_end = block + block_size
    first = rows - (back + length if window is None else window - 1)
    end = torch.where(is_noisy, block, rows + 1 if token else block_end)
    of_clean = _within(clean, first, end)
    of_noisy = _within(noisy, torch.maximum(first, block), block_end.where(is_noisy, -1))
    seen = torch.cat([of_clean, of_noisy], 1)
    mask = torch.zeros(seen.shape, dtype=dtype, device="cpu").masked_fill_(~seen, -torch.inf)
    if not with_distance:
        return mask, mask
    return mask, (rows[:, None] - torch.cat([clean, noisy])).abs_().to(dtype)


def _within(keys: Tensor, first: Tensor, end: Tensor) -> Tensor:
    """Which keys are from each row's first on and before its end."""
    return (keys >= first[:, None]) & (keys < end[:, None])
