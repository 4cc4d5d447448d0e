import copy
import warnings

import pytest
import torch
from fuse_network import (
    Block,
    Renamed,
    inputs,
    network,
    registered,
)
from torch import nn

from dblocks.integrations.fuse import (
    Replacement,
    dit_block,
    fuse_,
    register_fusion,
    unfuse_,
)
from tools import DEVICE

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _registered():
    with registered():
        yield


def test_class_changed_since_is_an_error():
    model = network()
    fuse_(model)
    block = model.blocks[1]
    block.__class__ = type("Sharded", (type(block),), {})
    with pytest.raises(RuntimeError, match=r"blocks.1 must have the class .* got Sharded made of"):
        unfuse_(model)
    assert "FusedBlock" in repr(model.blocks[0])
    x, c = inputs()
    assert copy.deepcopy(model.blocks[0])(x, c).shape == x.shape


@pytest.mark.parametrize(
    ("error", "message", "impl", "dtype"),
    [
        (ValueError, r"impl must be one of auto, .* got 'cuda'", "cuda", torch.float32),
        (TypeError, r"fuse_: impl='triton' takes float32, .* float64", "triton", torch.float64),
        (TypeError, r"fuse_: impl='cpp' takes float32, .* float64", "cpp", torch.float64),
    ],
)
@pytest.mark.skipif(DEVICE.type == "cuda", reason="the same checks, with tensors on the CPU")
def test_an_implementation_that_cannot_run_changes_nothing(error, message, impl, dtype):
    model = network().to(dtype)
    with pytest.raises(error, match=message):
        fuse_(model, impl=impl)
    assert unfuse_(model) == []


@pytest.mark.skipif(DEVICE.type == "cuda", reason="Triton runs there")
def test_triton_without_a_gpu_or_without_triton(monkeypatch):
    from dblocks.ops import _dispatch

    model = network()
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match=r"fuse_: impl='triton' needs tensors on a GPU"):
        fuse_(model, impl="triton")
    monkeypatch.setattr(_dispatch, "HAS_TRITON", False)
    with pytest.raises(ImportError, match=r"fuse_: impl='triton' needs the package triton"):
        fuse_(model, impl="triton")
    assert unfuse_(model) == []


def test_register_fusion_checks_its_arguments():
    with pytest.raises(TypeError, match=r"cls must be a subclass of torch.nn.Module, got 3"):
        register_fusion(3, dit_block)
    with pytest.raises(TypeError, match=r"forward must be a function, got None"):
        register_fusion(Block, None)
    with pytest.raises(ValueError, match=r"must define forward, got Renamed, .* register Block"):
        register_fusion(Renamed, dit_block)


def test_registered_forward_may_call_the_original():
    class Halved(nn.Module):
        def forward(self, x):
            return x / 2

    register_fusion(Halved, lambda self, x: self.unfused.forward(self, x) + 1)
    model = Halved()
    assert fuse_(model) == [Replacement("", f"{Halved.__qualname__}", "registered")]
    assert model(4.0) == 3.0


def test_no_warning_is_given_for_what_is_not_known():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fuse_(nn.Linear(2, 2)) == []


def test_arguments_of_another_kind():
    for call in (fuse_, unfuse_):
        with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
            call(None)
    with pytest.raises(TypeError, match="filter_fn"):
        fuse_(nn.Linear(2, 2), filter_fn=3)
