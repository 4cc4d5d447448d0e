"""What a Triton kernel's launch is planned from: the layout of its arguments, and nothing else."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dblocks.functional import (
    adaln,
    doubled_attention,
    edm_denoise,
    edm_loss,
    euler_step,
    noise_inject,
)
from dblocks.ops import _dispatch
from tools import DEVICE, normal

LEVELS = torch.tensor([0.5, 2.0], device=DEVICE)
x, y = (normal(2, 4, 16, seed=i) for i in range(2))
qkv = normal(3, 1, 2, 8, 16, seed=2)
GENERATED = torch.tensor(5, device=DEVICE)
# Calls of one layout, by the numbers in which they differ.
CALLS = {
    "eps": (lambda eps, impl: adaln(x, None, None, eps=eps, impl=impl), [1e-6, 1.0]),
    "seed": (lambda seed, impl: noise_inject(x, LEVELS, seed, impl=impl), [1, -7, 2**40]),
    "offset": (
        lambda offset, impl: noise_inject(x, LEVELS, GENERATED, offset=offset, impl=impl),
        [0, 1, 4, 2**33, 2**33 + 2],
    ),
    "sigma_data": (
        lambda data, impl: noise_inject(x, LEVELS, 1, sigma_data=data, impl=impl),
        [0.5, 1.0],
    ),
    "loss": (
        lambda number, impl: edm_loss(
            x, y, LEVELS, number, offset=number, sigma_data=float(number), impl=impl
        ),
        [1, 2, 4, 8],
    ),
    "denoise": (
        lambda data, impl: edm_denoise(x, y, LEVELS, sigma_data=data, impl=impl),
        [0.5, 1.0],
    ),
    "levels": (
        lambda sigma, impl: euler_step(x, y, sigma, sigma / 3, impl=impl),
        [3.0, 1.0],
    ),
    "next": (lambda sigma, impl: euler_step(x, y, LEVELS, sigma, impl=impl), [0.3, 0.0]),
    "scale": (lambda scale, impl: doubled_attention(*qkv, scale=scale, impl=impl), [0.3, 2.0]),
    "softcap": (
        lambda cap, impl: doubled_attention(*qkv, softcap=cap, impl=impl),
        [0.5, 20.0],
    ),
}


@pytest.fixture
def plans(monkeypatch):
    monkeypatch.setattr(_dispatch, "_plans", {})
    return _dispatch._plans


@pytest.mark.parametrize("name", CALLS)
def test_numbers_are_those_of_the_call(name, plans):
    call, numbers = CALLS[name]
    found = [call(number, impl="triton") for number in numbers]
    assert len(plans) == 1
    for number, result in zip(numbers, found, strict=True):
        torch.testing.assert_close(result, call(number, impl="reference"), rtol=1e-4, atol=1e-4)


def counted(copies=()):
    """An op that counts its plans, and says how its tensors lie."""
    made = []

    def make(*args):
        made.append(args)
        return copies, lambda *args: [a.stride() for a in args if isinstance(a, torch.Tensor)]

    return made, make


def test_a_layout_is_all_that_a_launch_depends_on(plans):
    made, make = counted()
    call, flat = _dispatch.planned(make, [2]), torch.empty(513)
    base = flat[:512].view(4, 8, 16)
    kinds = [
        base, base.half(), base[:2], base.transpose(0, 1), flat[1:].view(4, 8, 16), base.to("meta")
    ]  # fmt: skip
    options = [None, 1, 2, [True, False], [True, True], torch.float16, 0.5]
    for _ in range(2):
        for value in (0.5, 2.0):
            for x in kinds:
                call(x, value, int(value * 10), None)
            for option in options:
                call(base, value, 7, option)
    assert len(made) == len(kinds) + len(options) - 1  # the same with None
    call(torch.empty(4, 8, 16), 1.0, 1, None)
    assert len(made) == len(kinds) + len(options) - 1


def test_what_is_copied_is_contiguous_and_nothing_else_is_copied(plans):
    _, make = counted(copies=[1])
    x = torch.empty(4, 6).t()
    assert _dispatch.planned(make)(x, x, None, x) == [(1, 6), (4, 1), (1, 6)]


def test_their_number_is_bounded(plans, monkeypatch):
    monkeypatch.setattr(_dispatch, "MAX_PLANS", 3)
    for T in (*range(1, 8), 7):
        x = normal(1, T, 4, seed=T)
        torch.testing.assert_close(
            adaln(x, None, None, impl="triton"), adaln(x, None, None, impl="reference")
        )
        assert 1 <= len(plans) <= 3


def test_threads_share_them(plans):
    _, make = counted()
    call = _dispatch.planned(make)

    def run(seed):
        x = torch.empty(1 + seed % 3, 2 + seed % 5)
        assert call(x, float(seed)) == [x.stride()]

    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(run, range(200)))) == 200
    assert len(plans) == 15


def test_lazily_negated_tensors_have_their_sign():
    n = torch.view_as_complex(normal(2, 4, 1, 2, seed=3)).conj().imag
    assert n.is_neg()
    found = edm_denoise(n, n, LEVELS, impl="triton")
    whole = n.resolve_neg()
    torch.testing.assert_close(found, edm_denoise(whole, whole, LEVELS, impl="reference"))
    found = adaln(n, n[:, 0], None, impl="triton")
    torch.testing.assert_close(found, adaln(whole, whole[:, 0], None, impl="reference"))
