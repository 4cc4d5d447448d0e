"""Maps the top-level kernels/ folder to the import name dblocks.kernels, and builds csrc/.

The folder has no __init__.py on purpose: a top-level package called `kernels` would shadow the one
that transformers and diffusers import (see DESIGN.md).

The C++ ops for CPUs are optional: without torch at build time, without a compiler, with one that
fails, or with DBLOCKS_NO_EXT=1 in the environment the package works without them, on the reference.
The library is of LibTorch's stable ABI and Python's limited API: one build serves every supported
version of both.
"""

import os
import sys
from pathlib import Path

from setuptools import find_packages, setup

PYTHON_TAG = "cp310"  # the oldest Python, as requires-python in pyproject.toml
TORCH_TARGET = "0x020b000000000000"  # 2.11, the oldest torch
# Where to look for trouble: address and undefined-behaviour sanitizers (`make asan`).
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1", "-O1"]


def extension() -> dict:
    """The arguments of setup() that build csrc/; none where it cannot or must not be built."""
    if os.environ.get("DBLOCKS_NO_EXT", "0") not in ("", "0"):
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print("dblocks: no torch at build time, so no C++ ops for CPUs", file=sys.stderr)
        return {}

    class Build(BuildExtension):
        """Goes on without the extension where it cannot be built."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if os.environ.get("DBLOCKS_REQUIRE_EXT", "0") not in ("", "0"):
                    raise
                self.extensions = []
                print(f"dblocks: no C++ ops for CPUs, the build failed: {error}", file=sys.stderr)

    flags = ["-std=c++20", "-O3", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
    flags += ["-fno-trapping-math", "-Wno-psabi", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    flags += [f"-DPy_LIMITED_API=0x{3:02x}{10:02x}0000"]
    sanitize = SANITIZE if os.environ.get("DBLOCKS_SANITIZE") else []
    sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
    return {
        "ext_modules": [
            CppExtension(
                "dblocks._C",
                sources,
                depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
                extra_compile_args=flags + sanitize,
                extra_link_args=sanitize,
                py_limited_api=True,
            )
        ],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": PYTHON_TAG}},
    }


setup(
    packages=[*find_packages(include=["dblocks", "dblocks.*"]), "dblocks.kernels"],
    package_dir={"dblocks.kernels": "kernels"},
    package_data={"dblocks": ["py.typed"]},
    **extension(),
)
