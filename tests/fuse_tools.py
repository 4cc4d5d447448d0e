"""What the tests of fused models of diffusers set up in the same way."""

import copy

import torch
from torch import nn

from dblocks.testing import assert_within_budget
from tools import DEVICE, normal

N, HEADS, HEAD, D = 2, 2, 16, 32
DRAWS = 4


def started(module):
    """Random parameters, with norms near 1: far from it the queries' gradients cancel."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(std=0.1).add_(name.endswith("weight") and p.ndim == 1)
    return module.to(DEVICE)


def run(model, floats, others, dtype, seed, call):
    """Outputs and every gradient of a module, by name, at inputs drawn anew."""
    floats = {
        k: normal(*v.shape, seed=seed + i).to(dtype).requires_grad_()
        for i, (k, v) in enumerate(floats.items())
    }
    torch.manual_seed(seed)  # of the label dropout
    outputs = call(model, **floats, **others)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    outputs = [o for o in outputs if o is not None]
    leaves = {**floats, **dict(model.named_parameters())}
    upstream = [normal(*o.shape, seed=seed + 9).to(o.dtype) for o in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True)
    return {f"output {i}": o for i, o in enumerate(outputs)} | dict(zip(leaves, grads, strict=True))


def results(model, floats, others, dtype, *, call=None):
    """What a copy of the module in `dtype` gives, by name, at all draws of the inputs.

    The largest error of one draw has much chance in it, above all in the gradient of a bias.
    """
    model = nn.Module.to(copy.deepcopy(model), dtype)
    call = call or (lambda model, **inputs: model(**inputs))
    draws = [run(model, floats, others, dtype, 10 * i, call) for i in range(DRAWS)]
    return {
        k: None if v is None else torch.stack([draw[k].detach() for draw in draws])
        for k, v in draws[0].items()
    }


def assert_same_function(plain, fused, floats, others, dtype, call=None):
    """`fused` computes what `plain` does, within the budget of each output and gradient."""
    ref64, eager, got = (
        results(model, floats, others, d, call=call)
        for model, d in ((plain, torch.float64), (plain, dtype), (fused, dtype))
    )
    largest = max(v.abs().max().item() for v in ref64.values() if v is not None)
    for name, expected in ref64.items():
        if expected is None:
            assert got[name] is eager[name] is None, name
        elif expected.abs().max() < 1e-12 * largest:
            # Softmax cancels a bias of the keys: its gradient is rounding error alone.
            assert got[name].abs().max() < 64 * torch.finfo(dtype).eps * largest, name
        else:
            assert_within_budget(got[name], expected, eager[name], name)
