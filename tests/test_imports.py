"""Which file may import which."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted(
    ".".join(path.relative_to(ROOT / "kernels").with_suffix("").parts)
    for path in (ROOT / "kernels").rglob("*.py")
)


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
def test_kernels_import_torch_triton_their_family_and_what_families_share(name):
    top, lazy = imports_of(ROOT / "kernels" / f"{name.replace('.', '/')}.py")
    ours = {module for module in top | lazy if module.startswith("dblocks")}
    family = name.partition(".")[0]
    allowed = (f"dblocks.kernels.{family}.", "dblocks.kernels._common.")
    if family == "reference":
        allowed = allowed[:1]
        assert not any(module.startswith("triton") for module in top | lazy)
    assert all(module.startswith(allowed) for module in ours)


# What a room may import, lowest first; a room imports those before it, and itself.
ORDER = (
    ("config",),
    ("ops",),
    ("functional",),
    ("nn", "schedules"),
    ("blocks",),
    ("sampling",),
    ("models",),
    ("checkpoint",),
    ("info", "testing"),
    ("integrations",),
    ("scale",),
    ("recipes",),
    ("__main__",),
)


@pytest.mark.parametrize("place", range(len(ORDER)))
def test_import_directions(place):
    above = {room for rooms in ORDER[place + 1 :] for room in rooms}
    for room in ORDER[place]:
        folder = ROOT / "dblocks" / room
        files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
        for file in files:
            for module in set.union(*imports_of(file)):
                assert not module.startswith("benchmarks"), (file, module)
                part = module.removeprefix("dblocks.").partition(".")[0]
                climbs = module.startswith("dblocks.") and part in above
                assert not climbs, (file, module)
            top, _ = imports_of(file)
            kernels = {m.partition("dblocks.kernels.")[2] for m in top if "dblocks.kernels" in m}
            assert not any(m and not m.startswith("reference") for m in kernels - {"reference"})


def test_every_room_has_its_place():
    found = {
        p.stem for p in (ROOT / "dblocks").iterdir() if p.suffix == ".py" or any(p.glob("*.py"))
    }
    apart = {"__init__", "__pycache__", "_version", "kernels"}
    assert found - apart == {room for rooms in ORDER for room in rooms}


def test_only_the_command_line_imports_recipes_and_only_inside_functions():
    for file in (ROOT / "dblocks").rglob("*.py"):
        if "recipes" in file.parts or "kernels" in file.parts:
            continue
        top, lazy = imports_of(file)
        assert not any(module.startswith("dblocks.recipes") for module in top), file
        used = any(module.startswith("dblocks.recipes") for module in lazy)
        assert used == (file.name == "__main__.py"), file


def test_nothing_but_the_program_imports_the_command_line():
    importers = {
        file.name
        for file in (ROOT / "dblocks").rglob("*.py")
        if any("dblocks.__main__" in module for module in set.union(*imports_of(file)))
    }
    assert importers <= {"__main__.py"}
