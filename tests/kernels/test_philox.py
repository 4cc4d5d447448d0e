import math

import pytest
import torch
import triton
import triton.language as tl

from dblocks.kernels import reference
from dblocks.kernels._common import philox
from dblocks.kernels.reference._noise import TWO_PI

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COUNT = 1 << 18
SEEDS_AND_QUADS = [(0, 0), (7, 2**32 - 100), (-3, 2**40 + 5), (2**62 + 1, 2**31 - 100)]


@triton.jit
def bits_kernel(out_ptr, seed: tl.int64, first: tl.int64, COUNT: tl.constexpr):
    o_q = tl.arange(0, COUNT)
    bits = philox.philox_bits(seed, tl.full((1,), 0, tl.int64) + first, o_q)
    for lane in tl.static_range(4):
        tl.store(out_ptr + 4 * o_q + lane, tl.cast(bits[lane], tl.int64))


@triton.jit
def uniform_kernel(bits_ptr, out_ptr, COUNT: tl.constexpr, CLAMPED: tl.constexpr):
    o = tl.arange(0, COUNT)
    bits = tl.cast(tl.load(bits_ptr + o), tl.uint32)
    tl.store(out_ptr + o, philox.clamped_uniform(bits) if CLAMPED else philox.uniform(bits))


@triton.jit
def normals_kernel(
    out_ptr, seed: tl.int64, first: tl.int64, LENGTH: tl.constexpr, WIDE: tl.constexpr
):
    start = tl.full((1, 1), 0, tl.int64) + first
    tile = philox.tile_normals(seed, start, LENGTH, WIDE)
    tl.store(out_ptr + tl.arange(0, LENGTH)[None, :], tile)


@triton.jit
def functions_kernel(u_ptr, log_ptr, cos_ptr, sin_ptr, size, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(u_ptr + o, mask=o < size, other=0.5)
    cos, sin = philox.polar(u * 0.0 + 1.0, u * 6.2831855)
    tl.store(log_ptr + o, philox.minus_2_log(u), mask=o < size)
    tl.store(cos_ptr + o, cos, mask=o < size)
    tl.store(sin_ptr + o, sin, mask=o < size)


def philox_rounds(counter, key):
    """Philox 4x32-10 at any counter in Python integers, for the published answers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return tuple(c)


def triton_bits(seed, quad, count=16):
    out = torch.empty(4 * count, dtype=torch.int64, device=DEVICE)
    bits_kernel[(1,)](out, seed, quad, COUNT=count)
    return out.view(count, 4).cpu()


def reference_bits(seed, quad, count=16):
    quads = torch.arange(quad, quad + count)
    return torch.stack(reference.philox(seed, quads), dim=-1)


def triton_normals(seed, quad, *, wide, length=1024):
    out = torch.empty(length, device=DEVICE)
    normals_kernel[(1,)](out, seed, quad, LENGTH=length, WIDE=wide)
    return out.cpu()


# Random123, kat_vectors, "philox4x32 10".
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_rounds_give_the_answers_of_random123(counter, key, words):
    assert philox_rounds(counter, key) == words


@pytest.mark.parametrize(("seed", "quad"), SEEDS_AND_QUADS)
def test_bits_are_those_of_the_published_rounds(seed, quad):
    key = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    counters = [(q & 0xFFFFFFFF, q >> 32, 0, 0) for q in range(quad, quad + 16)]
    expected = torch.tensor([philox_rounds(c, key) for c in counters])
    assert torch.equal(reference_bits(seed, quad), expected)
    assert torch.equal(triton_bits(seed, quad), expected)


def test_bits_across_the_32_bit_boundary_of_the_counter():
    quad = 2**32 - 8
    assert torch.equal(triton_bits(5, quad), reference_bits(5, quad))


def test_uniforms_are_equal_bit_for_bit():
    # The middle ones are those about 2**31 * 1e-7 = 214.7.
    edges = [0, 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1, 2**24, 2**24 + 1, 214, 215, 2**32 - 216]
    edges = torch.tensor(edges)
    bits = torch.cat([edges, reference_bits(1, 0, 1024).flatten()])[:4096].to(DEVICE)
    out = torch.empty(4096, device=DEVICE)
    expected = reference.uniform(bits)
    assert 0 <= expected.min() <= expected.max() < 1
    uniform_kernel[(1,)](bits, out, COUNT=4096, CLAMPED=False)
    assert torch.equal(out, expected)
    uniform_kernel[(1,)](bits, out, COUNT=4096, CLAMPED=True)
    assert torch.equal(out, expected.clamp(min=1e-7))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("seed", "quad"), SEEDS_AND_QUADS)
def test_normals_agree_with_the_reference(seed, quad, wide):
    got = triton_normals(seed, quad, wide=wide)
    torch.testing.assert_close(got, reference.normals(1024, seed, 4 * quad), rtol=1e-6, atol=1e-6)


def test_polynomials_against_float64():
    near_quadrants = torch.arange(9)[:, None] / 8 + torch.linspace(-1e-6, 1e-6, 201)
    u = torch.cat(
        [
            torch.linspace(1e-7, 1, 1 << 18),
            torch.linspace(1e-7, 1e-4, 4096),
            1 - torch.arange(1, 4096) * 2.0**-24,
            near_quadrants.flatten(),
        ]
    )
    u = u.clamp(1e-7, 1 - 2.0**-24).to(DEVICE)
    log, cos, sin = (torch.empty_like(u) for _ in range(3))
    functions_kernel[(triton.cdiv(u.numel(), 1 << 16),)](u, log, cos, sin, u.numel(), BLOCK=1 << 16)
    exact = -2 * u.double().log()
    assert ((log - exact) / exact).abs().max() < 2e-7
    theta = (u * torch.tensor(TWO_PI, device=DEVICE)).double()
    assert (cos - theta.cos()).abs().max() < 1.5e-7
    assert (sin - theta.sin()).abs().max() < 1.5e-7


def test_a_sub_range_is_a_slice_of_the_whole():
    whole = reference.normals(1000, 3, offset=2**33 + 1)
    for start, count in ((0, 1000), (1, 5), (6, 333), (997, 3)):
        part = reference.normals(count, 3, offset=2**33 + 1 + start)
        assert torch.equal(part, whole[start : start + count])


def test_distribution():
    stats = pytest.importorskip("scipy.stats")
    eps = reference.normals(COUNT, 11).double()
    assert abs(eps.mean()) < 5 / math.sqrt(COUNT)
    assert abs(eps.var() - 1) < 5 * math.sqrt(2 / COUNT)
    assert abs((eps**3).mean()) < 5 * math.sqrt(15 / COUNT)
    assert abs((eps**4).mean() - 3) < 5 * math.sqrt(96 / COUNT)
    assert stats.kstest(eps.numpy(), "norm").pvalue > 1e-3
    expected_tail = COUNT * 2 * stats.norm.sf(4)
    assert abs((eps.abs() > 4).sum() - expected_tail) < 5 * math.sqrt(expected_tail)
    assert eps.abs().max() <= 5.678


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 64])
def test_neighbours_do_not_correlate(lag):
    eps = reference.normals(COUNT, 12)
    assert abs((eps[:-lag] * eps[lag:]).mean()) < 5 / math.sqrt(COUNT)
    squares = eps.square() - 1
    assert abs((squares[:-lag] * squares[lag:]).mean()) < 5 * 2 / math.sqrt(COUNT)


@pytest.mark.parametrize(
    ("seed", "offset"), [(13, 0), (-12, 0), (12 + 2**32, 0), (12, COUNT), (12, 2**34)]
)
def test_streams_do_not_correlate(seed, offset):
    first, second = reference.normals(COUNT, 12), reference.normals(COUNT, seed, offset)
    assert not torch.equal(first, second)
    assert abs((first * second).mean()) < 5 / math.sqrt(COUNT)
