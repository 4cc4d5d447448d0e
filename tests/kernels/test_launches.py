import ast

import pytest

from dblocks.kernels._common import launches
from tools import ROOT


@pytest.mark.parametrize("parts", [launches.FORWARD_PARTS, launches.BACKWARD_PARTS])
@pytest.mark.parametrize("D", [1, 7, 64, 257, 768, 1152, 1160, 1536, 4096, 5120, 8192, 16384])
def test_a_row_is_covered_by_parts_of_which_only_the_last_lacks_columns(D, parts):
    tile = launches.row_tile(D, 4096, parts)
    W = tile.BLOCK_D // tile.PARTS
    assert W * tile.PARTS == tile.BLOCK_D
    assert W & (W - 1) == 0
    assert 0 <= tile.BLOCK_D - D < W
    assert W == launches.MAX_PART or tile.PARTS <= parts  # noqa: SIM300
    assert 4 <= tile.num_warps <= 16


def test_sizes_count_in_eights_where_all_are_multiples():
    assert launches.common_step(1160, 0, 3480) == 8
    assert launches.common_step(1160, 4) == 1


def test_every_launch_says_whether_to_fuse():
    # Triton 3.10 changes the default, and so the bits of results.
    calls = [
        ast.unparse(node.func)
        for path in (ROOT / "kernels").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    ]
    assert not [call for call in calls if call.partition("[")[0].endswith("_kernel")]
    assert launches.Launch(None, 1, ()).options == {"enable_fp_fusion": True}
    assert launches.Launch(None, 1, (), enable_fp_fusion=False).options == {
        "enable_fp_fusion": False
    }


def test_a_launch_keeps_what_the_first_one_compiled():
    """And gives it the same arguments; without a compiled kernel it launches as at first."""
    calls = []

    class Kernel:
        compiled = None

        def __getitem__(self, grid):
            return lambda *args, **options: calls.append((grid, args, options)) or self.compiled

    kernel, compiled = Kernel(), Kernel()
    for kernel.compiled in (None, compiled):
        calls.clear()
        launch = launches.Launch(kernel, 3, (7, 8), num_warps=2)
        for x in "ab":
            launch.start(x, *launch.numbers)
        options = {"enable_fp_fusion": True, "num_warps": 2}
        again = {} if kernel.compiled else options
        assert calls == [((3, 1, 1), ("a", 7, 8), options), ((3, 1, 1), ("b", 7, 8), again)]
