"""doubled_attention against the mask that trainers of block diffusion write."""

import pytest
import torch
import torch.nn.functional as nnf
from attention_tools import IMPLS, composed_dtype, tensors

from dblocks.functional import doubled_attention
from tools import DEVICE


def three_parts(T, block_size):
    """Block diagonal, offset block causal and block causal, over `[noisy | clean]`."""
    row = torch.arange(2 * T)[:, None]
    key = torch.arange(2 * T)[None]
    clean_row, clean_key = row >= T, key >= T
    row_block = torch.where(clean_row, row - T, row) // block_size
    key_block = torch.where(clean_key, key - T, key) // block_size
    block_diagonal = (row_block == key_block) & (clean_row == clean_key)
    offset_block_causal = (row_block > key_block) & clean_key & ~clean_row
    block_causal = (row_block >= key_block) & clean_key & clean_row
    return (block_diagonal | offset_block_causal | block_causal).to(DEVICE)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize(("T", "size"), [(96, 32), (40, 16), (33, 1), (10, 4), (7, 50)])
def test_it_takes_the_place_of_their_mask(impl, T, size):
    inputs = tensors(N=2, H=4, heads=2, T=T, dtype=composed_dtype())
    leaves = [x.requires_grad_() for x in inputs]
    mask = three_parts(T, size)
    dense = nnf.scaled_dot_product_attention(*leaves, attn_mask=mask, enable_gqa=True)
    ours = doubled_attention(*leaves, order="noisy_clean", block_size=size, impl=impl)
    torch.testing.assert_close(ours, dense)
    upstream = torch.randn_like(ours)
    grads = [torch.autograd.grad(o, leaves, upstream) for o in (ours, dense)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
