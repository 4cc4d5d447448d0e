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
FAMILIES = [f"dblocks.kernels.{name}" for name in find_packages("kernels")]
# Where to look for trouble: address and undefined-behaviour sanitizers (`make asan`).
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1", "-O1"]


def is_set(name: str) -> bool:
    """Whether an environment variable asks for something."""
    return os.environ.get(name, "0") not in ("", "0")


def extension() -> dict:
    """The arguments of setup() that build csrc/; none where it cannot or must not be built."""
    if is_set("DBLOCKS_NO_EXT"):
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except (ImportError, OSError) as error:
        if is_set("DBLOCKS_REQUIRE_EXT"):
            raise
        print(f"dblocks: no C++ ops for CPUs, torch does not import: {error}", file=sys.stderr)
        return {}

    class Build(BuildExtension):
        """Goes on without the extension where it cannot be built."""

        def run(self) -> None:
            inplace = self.inplace  # setuptools changes it meanwhile
            try:
                super().run()
            except Exception as error:
                if is_set("DBLOCKS_REQUIRE_EXT"):
                    raise
                self.inplace = inplace
                self._remove_older()
                print(f"dblocks: no C++ ops for CPUs, the build failed: {error}", file=sys.stderr)

        def _remove_older(self) -> None:
            """Removes what an earlier build left, which would be taken for this one's."""
            for built in self.extensions:
                inside = Path(self.build_lib) / self.get_ext_filename(built.name)
                for path in (Path(self.get_ext_fullpath(built.name)), inside):
                    path.unlink(missing_ok=True)
            self.extensions = []

    flags = ["-std=c++20", "-O3", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
    flags += ["-fno-trapping-math", "-Wno-psabi", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    flags += [f"-DPy_LIMITED_API=0x{3:02x}{10:02x}0000"]
    sanitize = SANITIZE if os.environ.get("DBLOCKS_SANITIZE") else []
    sources = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))
    return {
        "ext_modules": [
            CppExtension(
                "dblocks._C",
                sources,
                depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
                include_dirs=[str(Path("csrc").resolve())],
                extra_compile_args=flags + sanitize,
                extra_link_args=sanitize,
                py_limited_api=True,
            )
        ],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": PYTHON_TAG}},
    }


setup(
    packages=[*find_packages(include=["dblocks", "dblocks.*"]), "dblocks.kernels", *FAMILIES],
    package_dir={"dblocks.kernels": "kernels"},
    package_data={"dblocks": ["py.typed"]},
    **extension(),
)
