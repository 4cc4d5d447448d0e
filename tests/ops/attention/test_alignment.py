"""Kernels of other libraries load 16 bytes at once: views whose rows begin elsewhere are copied."""

import pytest
import torch

from dblocks.ops._attention.composed import aligned

ROOM = torch.arange(2 * 6 * 200, dtype=torch.bfloat16)


def view(offset, row, dtype=torch.bfloat16, width=16):
    """[1, 3, 4, D] of heads that follow one another in a row of so many elements."""
    return ROOM.to(dtype).as_strided((1, 3, 4, width), (4 * row, width, row, 1), offset)


@pytest.mark.parametrize(
    ("x", "copied"),
    [
        (view(0, 48), False),
        (view(8, 56), False),  # both are multiples of 16 bytes
        (view(4, 48), True),  # a view that begins 8 bytes after a multiple
        (view(0, 52), True),  # rows of 104 bytes, such as a part of a concatenation
        (view(4, 48).contiguous(), False),
        (view(4, 48, torch.float32), False),
        (view(2, 48, torch.float32), True),
        (view(0, 48).expand(2, 3, 4, 16), False),
        (view(4, 48)[:, :0], False),
        (view(3, 43, width=12), False),  # rows of 24 bytes, which no copy aligns
    ],
)
def test_rows_that_begin_elsewhere_are_copied(x, copied):
    found = aligned(x)
    assert (found.data_ptr() != x.data_ptr()) == copied
    assert torch.equal(found, x)
    if copied:
        assert found.is_contiguous()
        assert found.data_ptr() % 16 == 0


def test_a_contiguous_view_that_begins_elsewhere_is_copied():
    x = ROOM[4 : 4 + 64].view(1, 1, 4, 16)
    assert x.is_contiguous()
    assert aligned(x).data_ptr() % 16 == 0
