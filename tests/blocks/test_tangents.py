"""Forward-mode derivatives of a whole denoiser: what consistency and mean-flow training need."""

from copy import deepcopy

import dit_tools
import pytest
import torch
from torch.autograd import forward_ad

import lm_tools
from dblocks.blocks import BlocksConfig, DiffusionBlocks
from tools import batch, normal, randomized, vit

pytestmark = pytest.mark.filterwarnings("default")  # PyTorch's own, of torch.jit


def network(kind):
    """A denoiser in float64, as a function of z and sigma, and a place to look at it."""
    if kind == "dit":
        dm, z, cond = dit_tools.blocks_of(), normal(4, 3, 4, 6), {"labels": dit_tools.some_labels()}
    elif kind == "vit":
        dm, z = DiffusionBlocks(randomized(vit()), BlocksConfig(3)), normal(8, 24)
        cond = {"images": batch()["images"].double()}
    else:
        blocks_of = lm_tools.blocks_of if kind == "lm" else lm_tools.recurrent_blocks_of
        dm, z, cond = blocks_of(), normal(2, 8, 16), {"tokens": lm_tools.tokens_of()}
    dm = deepcopy(dm).double()
    sigma = torch.linspace(0.5, 0.9, len(z), device=z.device)
    values = (z.double(), sigma.double())
    tangents = tuple(normal(*t.shape, seed=3).double() for t in values)
    return dm, lambda z, sigma: dm(z, sigma, block=0, **cond), values, tangents


def along(f, values, tangents, step=1e-4):
    def at(k):
        return f(*(v + k * step * t for v, t in zip(values, tangents, strict=True)))

    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)


@pytest.mark.parametrize("kind", ["dit", "vit", "lm", "recurrent"])
def test_the_derivative_of_a_prediction_in_state_and_level(kind):
    _, f, values, tangents = network(kind)
    with torch.no_grad():
        zero = torch.zeros_like(tangents[0])
        for directions in (tangents, (zero, tangents[1])):
            expected = along(f, values, directions)
            _, got = torch.func.jvp(f, values, directions)
            assert (got - expected).abs().max() < 1e-8 * expected.abs().max()
        with forward_ad.dual_level():
            dual = f(*map(forward_ad.make_dual, values, directions))
            torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, got)
            # A level that is the same for all samples.
            one = forward_ad.make_dual(values[1][0], torch.ones_like(values[1][0]))
            tangent = forward_ad.unpack_dual(f(values[0], one)).tangent
        same = (values[0], values[1][:1].expand(len(values[0])))
        expected = along(f, same, (zero, torch.ones_like(same[1])))
        assert (tangent - expected).abs().max() < 1e-8 * expected.abs().max()


def test_a_loss_of_the_derivative_trains():
    dm, f, values, tangents = network("dit")
    parameters = [p for p in dm.parameters() if p.requires_grad]

    def grads(tangent):
        return torch.autograd.grad(tangent.square().mean(), parameters, allow_unused=True)

    got = grads(torch.func.jvp(f, values, tangents)[1])
    expected = grads(along(f, values, tangents))
    scale = max(g.abs().max() for g in expected if g is not None)
    assert scale > 0
    for g, e in zip(got, expected, strict=True):
        assert (g is None and e is None) or (g - e).abs().max() < 1e-7 * scale
