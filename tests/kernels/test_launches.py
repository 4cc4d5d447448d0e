import ast

import pytest
import torch

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


def test_a_plan_is_made_once_and_their_number_is_bounded(monkeypatch):
    monkeypatch.setattr(launches, "_PLANS", {})
    monkeypatch.setattr(launches, "MAX_PLANS", 4)
    made = []
    for key in (0, 0, *range(20), 19):
        if launches.planned(key) is None:
            made.append(key)
            assert launches.keep(key, (key,)) == (key,)
        assert launches.planned(key) == (key,)
        assert len(launches._PLANS) <= 4
    assert made == list(range(20))


def test_a_layout_tells_apart_what_a_launch_depends_on():
    x = torch.empty(4, 8, 16)
    kinds = [x, x.half(), x[:2], x.transpose(0, 1), x.flatten()[1:449].view(4, 7, 16), None]
    assert len({launches.layout(a) for a in kinds}) == len(kinds)
    assert launches.layout(x) == launches.layout(torch.empty(4, 8, 16))


def test_every_launch_says_whether_to_fuse():
    # Triton 3.10 changes the default, and so the bits of results.
    calls = [
        node
        for path in (ROOT / "kernels").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    ]
    direct = [c for c in calls if ast.unparse(c.func.value).endswith("_kernel")]
    assert len(direct) >= 12
    for call in direct:
        assert "enable_fp_fusion" in [k.arg for k in call.keywords], ast.unparse(call.func)
    assert launches.Launch(None, 1, ()).options == {"enable_fp_fusion": True}
    assert launches.Launch(None, 1, (), enable_fp_fusion=False).options == {
        "enable_fp_fusion": False
    }
