import pytest
import torch
from torch import nn

from benchmarks.models import fuse
from dblocks.integrations.fuse import dit_final_layer, register_fusion, unfuse_

pytestmark = pytest.mark.usefixtures("one_thread")


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_final = nn.LayerNorm(8, elementwise_affine=False)
        self.linear = nn.Linear(8, 8)
        self.adaLN_modulation = nn.Linear(8, 16)

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Layer()

    def forward(self, hidden_states, c, return_dict):
        return (self.layer(hidden_states, c),)


def make(layers, batch):
    floats = {"hidden_states": torch.randn(batch, 3, 8), "c": torch.randn(batch, 8)}
    return fuse.Case("a layer", Model(), floats, {})


def uncompiled(self, **options):
    assert options == {"fullgraph": True}


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    register_fusion(Layer, dit_final_layer)
    monkeypatch.setattr(nn.Module, "compile", uncompiled)


def test_rows_and_table():
    rows = fuse.measure(make, torch.device("cpu"), 2, layers=3, batch=1)
    assert [r["form"] for r in rows] == list(fuse.FORMS)
    assert not any(r["wrong"] for r in rows)
    assert rows[1]["operators"] < rows[0]["operators"]
    assert rows[1]["saved_mib"] < rows[0]["saved_mib"]
    assert len(fuse.table(rows).splitlines()) == 2 + len(fuse.FORMS)


def test_forms_share_parameters_and_two_are_fused():
    case = fuse.prepared(make, 1, 2, torch.device("cpu"))
    found = fuse.forms(case, torch.float32)
    weights = {m.layer.linear.weight.data_ptr() for m in found.values()}
    assert len(weights) == 1
    assert len({id(m) for m in found.values()}) == 4
    assert [len(unfuse_(m)) for m in found.values()] == [0, 1, 0, 1]


def test_a_wrong_form_is_not_timed(monkeypatch):
    def forward(self, x, c):
        return 1.01 * dit_final_layer(self, x, c)

    register_fusion(Layer, forward)
    rows = fuse.measure(make, torch.device("cpu"), 2, layers=1, batch=1)
    assert [bool(r["wrong"]) for r in rows] == [False, True, False, True]
    assert "wrong: output: error" in fuse.table(rows)
    assert "ms" not in rows[1]
