"""Loads the C++ ops for CPUs, if they are built: importing `dblocks._C` registers them."""

import importlib
import importlib.util
import warnings

import torch

NOT_BUILT = "not built"
VERSION = 2  # of the ops in csrc/library.cpp: an older library must not be used with newer schemas


def _load() -> str:
    """The reason why the ops cannot run; empty if they can."""
    if importlib.util.find_spec("dblocks._C") is None:
        return NOT_BUILT
    try:
        importlib.import_module("dblocks._C")
        version = torch.ops.dblocks.cpp_version()
        if version == VERSION:
            return ""
        reason = f"built from other sources (version {version}, {VERSION} is needed)"
    except (ImportError, OSError, AttributeError) as error:
        reason = f"built, but do not load: {error}"
    warnings.warn(
        f"the C++ ops for CPUs are {reason}; every op on a CPU uses the reference. Build them again"
        " for the torch that is installed: pip install --no-build-isolation, from the checkout",
        RuntimeWarning,
        stacklevel=2,
    )
    return reason


MISSING = _load()
"""Why the C++ ops cannot run here; empty where they can."""
