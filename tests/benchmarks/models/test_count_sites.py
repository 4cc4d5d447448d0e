"""The benchmark's count of sites, which knows nothing of the pass that replaces them."""

import pytest
import torch
import torch.nn.functional as nnf
from torch import nn

from benchmarks.models.count_sites import SiteCount
from dblocks.integrations.fuse.compiler import compiler
from tools import normal

D = 8


def modulated(x, scale, shift, **_):
    return nnf.layer_norm(x, (D,)) * (1 + scale[:, None]) + shift[:, None]


def written_out(x, scale, shift, **_):
    root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return shift.unsqueeze(1) + (scale + 1).unsqueeze(1) * (x * root)


def gated(x, scale, weight, **_):
    return x + scale[:, None] * (x @ weight)


def per_token(x, table, weight, **_):
    shift, scale, gate = table.chunk(3, dim=-1)
    return x + gate * (modulated(x, scale[:, 0], shift[:, 0]) @ weight)


def unused(x, scale, shift, weight, **_):
    return modulated(x, scale, shift), gated(x, scale, weight)


def rotary(x, scale, shift, weight, **_):
    return x * scale[:1, None] + (x @ weight) * shift[:1, None]


def swiglu(x, table, weight, **_):
    a, b, _ = table.chunk(3, dim=-1)
    return x + (nnf.silu(a) * b) @ weight


def affine(x, weight, **_):
    return nnf.rms_norm(x, (D,), torch.ones(D)) * 2.0


CASES = [
    (modulated, 1, 0), (written_out, 1, 0), (gated, 0, 1), (per_token, 1, 1), (rotary, 0, 0),
    (swiglu, 0, 0), (affine, 0, 0),
]  # fmt: skip


def given():
    shapes = {"x": (2, 4, D), "scale": (2, D), "shift": (2, D), "weight": (D, D)}
    made = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    return made | {"table": normal(2, 4, 3 * D, seed=9)}


@pytest.mark.parametrize(("function", "modulations", "gates"), CASES)
def test_the_count_and_the_pass_agree(function, modulations, gates):
    inputs = given()
    with torch.no_grad(), SiteCount(nn.Module()) as counted:
        sites = counted.sites([function(**inputs)])
    found = {kind: n for (kind, _), n in sites.items()}
    assert found == {k: n for k, n in (("modulation", modulations), ("gate", gates)) if n}
    torch.compiler.reset()
    reports = []
    options = {"inner": "eager", "report": reports.append}
    compiled = torch.compile(function, backend=compiler, options=options)
    torch.testing.assert_close(compiled(**inputs), function(**inputs))
    assert sum((r.sites for r in reports), start=type(sites)()) == found


def test_what_no_output_needs_is_not_counted():
    inputs = given()
    with torch.no_grad(), SiteCount(nn.Module()) as counted:
        kept, _ = unused(**inputs)
    assert sum(counted.sites([kept]).values()) == 1
