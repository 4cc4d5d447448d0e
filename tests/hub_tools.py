"""What the tests beside other libraries set up in the same way."""

import sys
import types
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

# Where the Makefile installs what only these tests shall find: see requirements/no-deps.txt.
BESIDE = Path(sys.prefix) / "beside"
# Of torchvision's compiled operators, those that it describes to torch when it is imported.
BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


@cache
def stub_torchvision():
    """Lets torchvision import, and with it timm, transformers, peft and diffusers' pipelines.

    Its wheels on PyPI are built for CUDA: beside a torch for CPUs its operators do not load, and it
    stops at the first one that is missing. Nothing tested here calls them.
    """
    if BESIDE.is_dir():
        sys.path.append(str(BESIDE))
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    try:
        torch.ops.load_library(Path(spec.origin).with_name("_C.so"))
    except OSError:
        torch.library.define("torchvision::nms", BOXES)
        torch.library.define("torchvision::qnms", BOXES)


def library(name):
    """A library; where it is absent, the module that asks for it is skipped."""
    stub_torchvision()
    return pytest.importorskip(name)


@cache
def k_diffusion_sampling():
    """k-diffusion's `sampling` module, unchanged.

    Its package imports everything that its training programs need, so it is passed over; stand-ins
    take the place of two solver packages that samplers with fixed steps never call.
    """
    library("torchvision")
    spec = find_spec("k_diffusion")
    if spec is None:
        pytest.skip("could not import 'k_diffusion'", allow_module_level=True)
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    standing_in = {"k_diffusion": package}
    for name in ("torchdiffeq", "torchsde"):
        if find_spec(name) is None:
            standing_in[name] = types.ModuleType(name)
            standing_in[name].odeint = None
    sys.modules.update(standing_in)
    try:
        return import_module("k_diffusion.sampling")
    finally:
        # Others look for these packages too.
        for name in (*standing_in, "k_diffusion.utils", "k_diffusion.sampling"):
            sys.modules.pop(name, None)


def reset_accelerate():
    """Forgets the settings that accelerate keeps for the whole process."""
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)
