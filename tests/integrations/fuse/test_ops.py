import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dblocks.integrations.fuse import gated_add, gated_add_and_modulate, modulate
from dblocks.testing import DTYPES, assert_within_budget
from tools import DEVICE, FUSED, normal, randomized

N, T, D = 2, 6, 16


def plain_modulate(norm, x, shift, scale):
    y = norm(x)
    wide = [m if m is None or m.ndim != 2 else m[:, None] for m in (shift, scale)]
    y = y if wide[1] is None else y * (1 + wide[1])
    return y if wide[0] is None else y + wide[0]


SHAPES = st.sampled_from([None, (D,), (1, D), (N, D), (N, 1, D), (N, T, D), (N, 1, 1)])


@st.composite
def problems(draw):
    """x, branch, three modulations and the norm."""
    dtypes = st.sampled_from(DTYPES)

    def tensor(shape, seed):
        return normal(*shape, seed=seed).to(draw(dtypes))

    modulation = []
    for seed in range(3):
        shape = draw(SHAPES)
        modulation.append(None if shape is None else tensor(shape, seed + 5))
    eps, affine = draw(st.sampled_from([1e-6, 1e-2])), draw(st.booleans())
    norm = randomized(nn.LayerNorm(D, eps=eps, elementwise_affine=affine).to(DEVICE))
    x = tensor((N, T, D), 3)
    return x, tensor((N, T, D), 4), *modulation, norm.to(x.dtype)


@pytest.mark.parametrize("impl", FUSED)
@settings(max_examples=20)
@given(problem=problems())
def test_modulate_and_gated_add_are_the_plain_formulas(impl, problem):
    x, branch, gate, shift, scale, norm = problem
    wide_gate = gate if gate is None or gate.ndim != 2 else gate[:, None]
    x_new = x + (branch if gate is None else wide_gate * branch)
    assert (
        modulate(norm, x, shift, scale, impl).dtype == plain_modulate(norm, x, shift, scale).dtype
    )
    assert gated_add(x, branch, gate, impl).dtype == x_new.dtype
    norm = norm.to(x_new.dtype)
    double = [None if m is None else m.double() for m in (shift, scale)]
    ref = x.double() + (branch.double() if gate is None else wide_gate.double() * branch.double())
    got, y = gated_add_and_modulate(norm, x, branch, gate, shift, scale, impl)
    assert_within_budget(got, ref, x_new, "sum")
    # The norm sees the sum as it is stored, rounded.
    ref_y = plain_modulate(copy.deepcopy(norm).double(), got.double(), *double)
    assert_within_budget(y, ref_y, plain_modulate(norm, got, shift, scale), "modulated norm")


@pytest.mark.parametrize("shape", [(T, D), (N, 2, T, D)])
def test_other_shapes_take_the_plain_formula(shape):
    norm, x, branch = nn.LayerNorm(D), torch.randn(shape), torch.randn(shape)
    scale = torch.randn(D)
    assert torch.equal(modulate(norm, x, scale, scale), norm(x) * (1 + scale) + scale)
    assert torch.equal(gated_add(x, branch, scale), x + scale * branch)
    got = gated_add_and_modulate(norm, x, branch, scale, None, None)
    assert torch.equal(got[1], norm(x + scale * branch))


def test_one_sample_under_many_modulations_broadcasts_as_before():
    norm, x, scale = nn.LayerNorm(D), torch.randn(1, T, D), torch.randn(3, D)
    expected = norm(x) * (1 + scale[:, None])
    assert torch.equal(modulate(norm, x, None, scale), expected)
    assert torch.equal(gated_add(x, x, scale), x + scale[:, None] * x)


def test_norm_over_several_dimensions_keeps_its_own_forward():
    norm, x = nn.LayerNorm((T, D)), torch.randn(N, T, D)
    assert torch.equal(modulate(norm, x, None, None), norm(x))
