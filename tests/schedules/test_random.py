import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dblocks import functional as F
from dblocks.schedules.random import draw_seed, uniforms
from tools import DEVICE, Elsewhere, seeded


def philox(seed, counter):
    """Philox 4x32-10 of four counter words under two key words, in Python's integers."""
    key, c, low = [seed % 2**32, seed // 2**32], list(counter), 2**32 - 1
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ key[0], b & low, (a >> 32) ^ c[3] ^ key[1], a & low]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return c


@given(seed=st.integers(0, 2**63 - 1), number=st.integers(0, 2**40))
def test_a_uniform_is_that_of_its_counter(seed, number):
    (u,) = uniforms((1,), seed, offset=number).tolist()
    quad = 2**62 + number // 2
    words = philox(seed, (quad % 2**32, quad // 2**32, 0, 0))
    first, second = words[2:] if number % 2 else words[:2]
    assert u == ((first // 2**6) * 2**26 + second // 2**6 + 0.5) / 2**52
    assert 0 < u < 1


@given(shape=st.lists(st.integers(0, 5), max_size=3), offset=st.integers(0, 9))
def test_a_uniform_depends_on_its_number_alone(shape, offset):
    u = uniforms(shape, 5, DEVICE, offset=offset)
    assert u.shape == tuple(shape)
    assert u.dtype == torch.float64
    every = uniforms((200,), 5, DEVICE)
    assert torch.equal(u.flatten(), every[offset : offset + u.numel()])
    seed = torch.tensor(5, device=DEVICE)
    assert torch.equal(u, uniforms(shape, seed, DEVICE, offset=offset))
    assert u.numel() == 0 or not torch.equal(u, uniforms(shape, 6, DEVICE, offset=offset))


def test_uniforms_are_uniform_and_independent_of_each_other_and_of_the_normals():
    u = uniforms((20_000,), 11)
    assert stats.kstest(u.numpy(), "uniform").pvalue > 0.01
    # The lower half of the bits, too.
    assert stats.kstest((u * 2**26).remainder(1).numpy(), "uniform").pvalue > 0.01
    zeros, one = torch.zeros(1, 40_000), torch.ones(())
    normal = torch.special.ndtr(F.noise_inject(zeros, one, 11).z[0].double())
    pairs = [(u[1:], u[:-1]), (u, normal[:20_000]), (u, normal[::2]), (u[::2], normal[20_000::2])]
    for a, b in pairs:
        count = min(len(a), len(b))
        r = torch.corrcoef(torch.stack([a[:count], b[:count]]))[0, 1].abs().item()
        assert r < 4 / count**0.5
    assert len(set(u.tolist()) & set(uniforms((20_000,), 12).tolist())) == 0


def test_a_seed_is_one_number_of_a_cpu_generator():
    expected = int(torch.randint(2**63 - 1, (), generator=seeded(3)))
    assert draw_seed(seeded(3)) == expected
    torch.manual_seed(3)
    assert draw_seed() == expected
    elsewhere = Elsewhere()
    with pytest.raises(ValueError, match="generator must be on the CPU, got one on meta"):
        draw_seed(elsewhere)
