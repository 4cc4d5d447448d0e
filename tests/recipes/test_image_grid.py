import json

import pytest
import torch

from dblocks.recipes.image_grid import decode, encode, grid_figure, save_png, tiled, to_bytes
from tools import seeded


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_come_back_from_json(channels):
    images = 1.5 * torch.randn(4, channels, 3, 5, generator=seeded())
    written = json.loads(json.dumps(encode(images)))
    assert torch.equal(decode(written), to_bytes(images))
    assert decode(written).shape == (4, 3, 5, channels)
    assert to_bytes(torch.tensor([-3.0, 0.0, 2.0]).view(3, 1, 1, 1)).flatten().tolist() == [
        0,
        128,
        255,
    ]


def test_tiles_are_row_by_row_with_a_line_between():
    pixels = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 2, 3, 1)
    grid = tiled(pixels, 3)
    assert grid.shape == (5, 11, 1)
    assert grid[0, ::4, 0].tolist() == [0, 1, 2]
    assert grid[3, ::4, 0].tolist() == [3, 4, 255]
    assert (grid[2] == 255).all()
    assert (grid[:, 3] == 255).all()


def test_the_figure_has_a_panel_for_each(tmp_path):
    pixels = to_bytes(torch.randn(6, 1, 4, 4, generator=seeded()))
    panels = {f"row {i}": pixels for i in range(6)}
    figure = grid_figure(panels, 2, "all")
    titled = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert titled == list(panels)
    path = save_png(figure, tmp_path / "a" / "grid.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    colour = to_bytes(torch.randn(2, 3, 4, 4))
    save_png(grid_figure({"": colour}, 2), tmp_path / "colour.png")


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"C in \(1, 3\), got \[2, 4, 8, 8\]; latents must be"):
        encode(torch.zeros(2, 4, 8, 8))
    pixels = to_bytes(torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match="needs images and columns, got 2 and 0"):
        tiled(pixels, 0)
    with pytest.raises(ValueError, match="needs images and columns, got 0 and 1"):
        tiled(pixels[:0], 1)
