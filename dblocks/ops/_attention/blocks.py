"""The local term of impl="composed" where blocks have more than one token.

A block term has the scores of its keys, merges with a causal attention, and computes its gradients
given the log-sum-exp of the whole softmax; composed.py says more. Tensors are float32 or float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class BlockTerm:
    """Rows of q in blocks of `block_size`, and for each block some keys of its own.

    `k` and `v` are [N, Hkv, blocks, keys, Dh]; `mask` [blocks or 1, block_size, keys] says which of
    its block's keys a row attends to.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block_size: int, scale: float
    ) -> None:
        self.k, self.v, self.scale = k, v, scale
        self.rows, self.block_size = q.shape[2], block_size
        self.q = self._fold(q)
        scores = (self.q @ k.mT).mul_(scale)  # [N, Hkv, blocks, group * block_size, keys]
        scores.unflatten(3, (-1, block_size)).masked_fill_(~mask.unsqueeze(1), -torch.inf)
        self.scores = scores

    def _fold(self, x: Tensor) -> Tensor:
        """[N, H, L, D] as [N, Hkv, blocks, group * block_size, D], padded with zeros."""
        blocks = into_blocks(x, self.block_size).unflatten(1, (self.k.shape[1], -1))
        return blocks.transpose(2, 3).flatten(3, 4)

    def _unfold(self, x: Tensor) -> Tensor:
        """The inverse of `_fold`."""
        grouped = x.unflatten(3, (-1, self.block_size)).transpose(2, 3)
        return grouped.flatten(3, 4).flatten(1, 2)[:, :, : self.rows]

    def _p(self, lse: Tensor) -> Tensor:
        return (self.scores - self._fold(lse.unsqueeze(-1))).exp_()

    def merge(self, part: Tensor, part_lse: Tensor, o: Tensor, lse: Tensor) -> None:
        """Writes `o` and `lse`; a row without any key of its own has a part."""
        first = self.rows - part.shape[2]
        lse.copy_(self._unfold(self.scores.logsumexp(-1, keepdim=True)).squeeze(-1))
        later = lse[:, :, first:]
        torch.logaddexp(later, part_lse, out=later)
        o.copy_(self._unfold(self._p(lse) @ self.v))
        o[:, :, first:] += part * (part_lse - later).exp_().unsqueeze(-1)

    def backward(self, grad: Tensor, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, and of k and v as given, in blocks."""
        p = self._p(lse)
        delta = self._fold((grad * o).sum(-1, keepdim=True))
        grad = self._fold(grad)
        dv = p.mT @ grad
        ds = (grad @ self.v.mT).sub_(delta).mul_(p).mul_(self.scale)
        return self._unfold(ds @ self.k), ds.mT @ self.q, dv


def into_blocks(x: Tensor, block_size: int) -> Tensor:
    """[N, H, L, D] as [N, H, blocks, block_size, D], the last block padded with zeros."""
    missing = -x.shape[2] % block_size
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    return x.unflatten(2, (-1, block_size))


def from_blocks(x: Tensor, rows: int) -> Tensor:
    """The inverse of `into_blocks`."""
    return x.flatten(2, 3)[:, :, :rows]


def clean_blocks(q: Tensor, k: Tensor, v: Tensor, block_size: int, scale: float) -> BlockTerm:
    """Clean rows, and the later clean rows of their own block."""
    keys, values = into_blocks(k, block_size), into_blocks(v, block_size)
    mask = _is_later(block_size, q) & _is_real(q.shape[2], block_size, q)
    return BlockTerm(q, keys, values, mask, block_size, scale)


def noisy_blocks(
    q: Tensor,
    k_clean: Tensor,
    v_clean: Tensor,
    k_noisy: Tensor,
    v_noisy: Tensor,
    block_size: int,
    scale: float,
) -> BlockTerm:
    """Noisy rows; the clean rows of a later offset in the block before, and the own noisy block."""

    def keys(clean: Tensor, noisy: Tensor) -> Tensor:
        before = F.pad(into_blocks(clean, block_size), (0, 0, 0, 0, 1, 0))[:, :, :-1]
        return torch.cat([before, into_blocks(noisy, block_size)], 3)

    own = _is_real(q.shape[2], block_size, q).expand(-1, block_size, -1)
    before = _is_later(block_size, q).repeat(len(own), 1, 1)
    before[0] = False
    mask = torch.cat([before, own], 2)
    return BlockTerm(q, keys(k_clean, k_noisy), keys(v_clean, v_noisy), mask, block_size, scale)


def _is_later(block_size: int, like: Tensor) -> Tensor:
    """Whether a key's offset in its block is later than the row's: [1, block_size, block_size]."""
    ones = torch.ones(1, block_size, block_size, dtype=torch.bool, device=like.device)
    return ones.triu(1)


def _is_real(rows: int, block_size: int, like: Tensor) -> Tensor:
    """Whether a key is not padding: [blocks, 1, block_size]."""
    blocks = -(-rows // block_size)
    return torch.arange(blocks * block_size, device=like.device).view(blocks, 1, block_size) < rows
