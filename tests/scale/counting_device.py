"""The device "counting" of counting_device.cpp, built once into build/counting_device.

Importing this gives the process that device; tests import it in processes of their own.
"""

import types
from pathlib import Path

import torch
from torch.utils.cpp_extension import load

NAME = "counting"
HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / f"counting_device-{torch.__version__}"


def build():
    """Builds it if need be, and loads it."""
    BUILD.mkdir(parents=True, exist_ok=True)
    return load(
        "counting_device",
        [str(HERE / "counting_device.cpp")],
        build_directory=str(BUILD),
        extra_cflags=["-O1", "-w"],
    )


def _module():
    module = types.ModuleType(NAME)
    module.is_available = module.is_initialized = lambda: True
    module.device_count, module.current_device = lambda: 1, lambda: 0
    module._is_in_bad_fork, module.manual_seed_all = lambda: False, lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    return module


torch.utils.rename_privateuse1_backend(NAME)
torch._register_device_module(NAME, _module())
counting = build()
torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
