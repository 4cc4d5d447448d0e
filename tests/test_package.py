"""How the package installs and imports: checked in fresh interpreters."""

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted(p.stem for p in (ROOT / "kernels").glob("*.py"))
OPTIONAL = ("triton", "tyro", "tqdm", "safetensors", "sklearn", "matplotlib", "hypothesis", "scipy")


def run(code: str, *, root_on_path: bool = False, **environment: str) -> str:
    """Standard output of `code` in a fresh interpreter, away from the repository."""
    path = {"PYTHONPATH": str(ROOT)} if root_on_path else {}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd="/", env=os.environ | path | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_and_loads_no_optional_package():
    run(
        f"""
import importlib, pkgutil, sys
for name in {OPTIONAL}:
    sys.modules[name] = None
import dblocks, dblocks.functional, dblocks.nn, dblocks.models.vit
from dblocks.functional import residual_adaln
import torch
x = torch.randn(2, 3, 4, requires_grad=True)
x_new, y = residual_adaln(x, x, None, torch.ones(2, 4), torch.ones(2, 4))
(x_new + y).sum().backward()
""",
        root_on_path=True,
    )


def test_import_loads_no_optional_package_that_is_there():
    loaded = run("import dblocks, dblocks.functional, sys; print(*sys.modules)", root_on_path=True)
    top_level = {name.partition(".")[0] for name in loaded.split()}
    before = run("import torch, sys; print(*sys.modules)")
    torch_itself = {name.partition(".")[0] for name in before.split()}
    assert not (top_level - torch_itself) & set(OPTIONAL)


def test_triton_asked_for_where_it_is_absent():
    out = run(
        """
import sys
sys.modules["triton"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
import torch
from dblocks.functional import adaln
x = torch.randn(1, 2, 4)
adaln(x, None, None)
try:
    adaln(x, None, None, impl="triton")
except ImportError as error:
    print(error)
""",
        root_on_path=True,
    )
    assert "impl='triton' needs the package triton" in out


def test_triton_asked_for_on_a_cpu_without_the_interpreter():
    out = run(
        """
import torch
from dblocks.functional import adaln
try:
    adaln(torch.randn(1, 2, 4), None, None, impl="triton")
except RuntimeError as error:
    print(error)
""",
        root_on_path=True,
        TRITON_INTERPRET="0",
    )
    assert "needs tensors on a GPU, got device cpu" in out


def test_the_name_kernels_stays_free():
    out = run(
        f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from importlib import import_module
from importlib.util import find_spec
spec = find_spec("kernels")
print(spec.origin if spec else None)
for name in {KERNELS}:
    import_module(f"dblocks.kernels.{{name}}")
"""
    )
    assert out.split() == ["None"]
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert os.readlink(ROOT / "dblocks" / "kernels") == "../kernels"


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """Modules that a file imports at its top level, and inside functions."""
    tree = ast.parse(path.read_text())
    top, lazy = set(), set()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        (top if node in tree.body else lazy).update(names)
    return top, lazy


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_import_torch_triton_and_each_others_shared_parts_only(name):
    top, lazy = imports_of(ROOT / "kernels" / f"{name}.py")
    ours = {module for module in top | lazy if module.startswith("dblocks")}
    assert all(module.removeprefix("dblocks.kernels.").startswith("_") for module in ours)
    if name == "reference":
        assert not ours
        assert not any(module.startswith("triton") for module in top | lazy)


LAYERS = {
    # module -> the modules of dblocks that it must not import: what is built on top of it
    "ops": ("functional", "nn", "schedule", "blocks", "train", "sample", "models", "cli"),
    "functional": ("nn", "schedule", "blocks", "train", "sample", "models", "cli"),
    "nn": ("blocks", "train", "sample", "models", "cli"),
    "schedule": ("functional", "ops", "nn", "blocks", "train", "sample", "models", "cli"),
    "blocks": ("train", "sample", "models", "cli"),
    "train": ("models", "cli"),
    "sample": ("train", "models", "cli"),
    "models": ("convert", "fuse", "cli"),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_import_directions(layer):
    folder = ROOT / "dblocks" / layer
    files = sorted(folder.glob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    for file in files:
        for module in set.union(*imports_of(file)):
            part = module.removeprefix("dblocks.").partition(".")[0]
            assert not (module.startswith("dblocks.") and part in LAYERS[layer]), (file, module)
        top, _ = imports_of(file)
        kernels = {m.partition("dblocks.kernels.")[2] for m in top if "dblocks.kernels" in m}
        assert not any(m and not m.startswith("reference") for m in kernels - {"reference"})


def test_nothing_but_the_program_imports_the_command_line():
    importers = {
        file.name
        for file in (ROOT / "dblocks").rglob("*.py")
        if any("dblocks.cli" in module for module in set.union(*imports_of(file)))
    }
    assert importers <= {"__main__.py"}


@pytest.mark.slow
def test_sdist_and_wheel_hold_every_module(tmp_path):
    build = "from setuptools.build_meta import *; print(build_sdist({0!r}), build_wheel({0!r}))"
    copy = tmp_path / "source"
    left_out = (".venv", ".git", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*left_out))
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", build.format(str(tmp_path))],
        cwd=copy, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    (sdist,) = tmp_path.glob("*.tar.gz")
    inside = set(zipfile.ZipFile(wheel).namelist())
    for name in KERNELS:
        assert f"dblocks/kernels/{name}.py" in inside
    assert {"dblocks/__init__.py", "dblocks/py.typed", "dblocks/ops/adaln.py"} <= inside
    assert not any(name.startswith(("kernels/", "tests/", "benchmarks/")) for name in inside)
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("/kernels/reference.py") for name in archive.getnames())
    code = "import dblocks.kernels.reference, dblocks.functional; print(dblocks.__file__)"
    assert run(f"import sys; sys.path.insert(0, {str(wheel)!r})\n{code}").startswith(str(wheel))
