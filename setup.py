"""Maps the top-level kernels/ folder to the import name dblocks.kernels.

The folder has no __init__.py on purpose: a top-level package called `kernels` would shadow the one
that transformers and diffusers import (see DESIGN.md).
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["dblocks", "dblocks.*"]), "dblocks.kernels"],
    package_dir={"dblocks.kernels": "kernels"},
    package_data={"dblocks": ["py.typed"]},
)
