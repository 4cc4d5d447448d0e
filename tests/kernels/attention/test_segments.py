"""Either order of the halves, and that nothing leaves a document or what is valid of a sample."""

import pytest
import torch
from attention_kernel_tools import PLAIN, backward, documents, forward, noisy_rows, ranges

from tools import DEVICE, normal

pytestmark = pytest.mark.usefixtures("poisoned_empty")

SEVERAL = {"block_size": 3, "window": 4, "softcap": 2.0, "alibi_slopes": [0.5, 1.0]}
FORMS = pytest.mark.parametrize("change", [{}, SEVERAL, {"noisy_only": True}], ids=str)


def halved(change):
    """Tensors of 2 heads and T = 18 under `change`, with their options."""
    options = PLAIN | change
    if "alibi_slopes" in options:
        options["alibi_slopes"] = torch.tensor(options["alibi_slopes"], device=DEVICE)
    do, q, k, v = (normal(1, 2, 36, 16, seed=seed) for seed in range(4))
    if options.get("noisy_only"):
        do, q = (x[:, :, noisy_rows(18, options)] for x in (do, q))
    return [do, q, k, v], options


def results(inputs, options):
    do, q, k, v = inputs
    o, lse = forward(q, k, v, options)
    return [o, *backward(do, q, k, v, o, lse, options)]


@FORMS
def test_either_order_of_the_halves_gives_the_same_bits(change):
    inputs, options = halved(change)
    swapped = [x if x.shape[2] == 18 else x.roll(18, 2) for x in inputs]
    for a, b in zip(
        results(inputs, options), results(swapped, options | {"noisy_first": True}), strict=True
    ):
        assert torch.equal(a, b if a.shape[2] == 18 else b.roll(18, 2))


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # NumPy's, of the poison
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@FORMS
def test_nothing_leaves_a_document(change, value):
    inputs, options = halved(change)
    options["cu_seqlens"] = documents(5, 5, 12, 18)
    before = results(inputs, options)
    poisoned = [x.clone() for x in inputs]
    for x in poisoned:
        x.unflatten(2, (-1, 18))[:, :, :, 5:12] = value
    for a, b in zip(before, results(poisoned, options), strict=True):
        a, b = (x.unflatten(2, (-1, 18)) for x in (a, b))
        assert torch.equal(a[:, :, :, :5], b[:, :, :, :5])
        assert torch.equal(a[:, :, :, 12:], b[:, :, :, 12:])
        assert not b[:, :, :, 5:12].isfinite().any()


@pytest.mark.parametrize("limits", [(0, 18), (3, 11), (17, 18), (4, 4)])
@FORMS
def test_rows_outside_of_valid_are_zero_and_change_nothing(change, limits):
    inputs, options = halved(change)
    start, end = limits
    whole = dict(options)
    options["valid"] = ranges(limits)
    inside = torch.zeros(18, dtype=torch.bool, device=DEVICE)
    inside[start:end] = True
    nan = torch.tensor(float("nan"), device=DEVICE)
    poisoned = [x.where(inside.repeat(x.shape[2] // 18)[:, None], nan) for x in inputs]
    got = results(poisoned, options)
    for x in got:
        assert not x[:, :, ~inside.repeat(x.shape[2] // 18)].any()
    # What is left is a sequence of its own.
    cut = lambda x: x[:, :, inside.repeat(x.shape[2] // 18)]
    for a, b in zip(got, results([cut(x) for x in inputs], whole), strict=True):
        assert torch.equal(cut(a), b)


def test_nothing_leaves_what_is_valid():
    inputs, options = halved({})
    options["valid"] = ranges((3, 11))
    inputs[3][:, :, 5] = float("nan")  # a clean value that later rows see
    o, dq, dk, dv = results(inputs, options)
    assert o[:, :, 6:11].isnan().all()
    inside = torch.zeros(36, dtype=torch.bool, device=DEVICE)
    inside[3:11] = inside[21:29] = True
    for x in (o, dq, dk, dv):
        assert not x[:, :, ~inside].any()
