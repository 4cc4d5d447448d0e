"""Segments of a sequence whose rows see each other only, and the tiles that they are cut into.

A tile never crosses the end of a segment. Without documents and `valid` the segment is the sample;
of `valid` it is that range of the sample; of documents a table, computed on the device, says for
each tile which it is. Documents that do not fill their last tile have one more tile each at most,
so shapes alone bound the number of tiles.
"""

import triton
import triton.language as tl

from dblocks.kernels._common import launches
from dblocks.kernels.attention.layout import Options

BLOCK_T, BLOCK_S = 64, 128  # tiles of a program, and documents that it looks at together


@triton.jit(do_not_specialize=["documents", "tiles"])
def segments_kernel(
    cu_seqlens_ptr, table_ptr, documents, tiles,
    ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Of each tile: first and end row of its document, the tile's start in it; zeros past the last.

    The document of a tile is the number of documents whose tiles all come before it.
    """
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    document = tl.zeros([BLOCK_T], tl.int32)
    before = tl.zeros([BLOCK_T], tl.int32)  # tiles of earlier documents
    total = 0
    for start in range(0, documents, BLOCK_S):
        o_s = start + tl.arange(0, BLOCK_S)
        m_s = o_s < documents
        first = tl.load(cu_seqlens_ptr + o_s, mask=m_s, other=0)
        end = tl.load(cu_seqlens_ptr + o_s + 1, mask=m_s, other=0)
        count = (end - first + (ROWS - 1)) // ROWS
        last = total + tl.cumsum(count, 0)
        m = m_s[None, :] & (last[None, :] <= o_t[:, None])
        document += tl.sum(m.to(tl.int32), 1)
        before = tl.maximum(before, tl.max(tl.where(m, last[None, :], 0), 1))
        total += tl.sum(count, 0)
    m_t = document < documents
    first = tl.load(cu_seqlens_ptr + document, mask=m_t, other=0)
    end = tl.load(cu_seqlens_ptr + document + 1, mask=m_t, other=0)
    start = tl.where(m_t, (o_t - before) * ROWS, 0)
    p = table_ptr + o_t * 3
    tl.store(p, first, mask=o_t < tiles)
    tl.store(p + 1, end, mask=o_t < tiles)
    tl.store(p + 2, start, mask=o_t < tiles)


@triton.jit
def segment(i_tile, i_n, table_ptr, valid_ptr, T, ROWS: tl.constexpr):
    """Of a tile: first row of its segment, length of that, start of the tile in it."""
    if table_ptr is not None:
        first = tl.load(table_ptr + i_tile * 3)
        end = tl.load(table_ptr + i_tile * 3 + 1)
        start = tl.load(table_ptr + i_tile * 3 + 2)
    else:
        start = i_tile * ROWS
        if valid_ptr is not None:
            first = tl.load(valid_ptr + i_n * 2)
            end = tl.load(valid_ptr + i_n * 2 + 1)
        else:
            first = start * 0
            end = first + T
    return first, end - first, start


def tiles_of(T: int, ROWS: int, options: Options) -> tuple[int, launches.Launch | None]:
    """How many tiles of ROWS rows the grid has for each sample, and the table of documents.

    The table is int32 [tiles, 3]; arguments of its launch are cu_seqlens and the table.
    """
    tiles = triton.cdiv(T, ROWS)
    if options.cu_seqlens is None:
        return tiles, None
    documents = len(options.cu_seqlens) - 1
    tiles += documents - 1
    numbers = (documents, tiles, ROWS, BLOCK_T, BLOCK_S)
    programs = triton.cdiv(tiles, BLOCK_T)
    return tiles, launches.Launch(segments_kernel, programs, numbers, num_warps=4)
