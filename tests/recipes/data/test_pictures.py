"""Files whose pixels are easily read as something else than a viewer shows."""

import numpy as np
import pytest
import torch
from PIL import Image

from dblocks.recipes.data.image_files import array_file, from_bytes, image_folder, images_of
from dblocks.recipes.data.images import hugging_face
from dblocks.recipes.data.pictures import read_picture
from tools import seeded

WIDE, HIGH = 6, 4


def grey(channels=1):
    """Pixels of which no two are alike, uint8 [H, W(, C)]."""
    count = HIGH * WIDE * channels
    values = torch.randperm(256, generator=seeded())[:count].to(torch.uint8)
    return values.view(HIGH, WIDE, channels).squeeze(-1)


def saved(path, image, **options):
    image.save(path, **options)
    return path


def picture(array, mode=None):
    image = Image.fromarray(np.asarray(array))
    return image if mode is None else image.convert(mode)


# 16 bits


def test_grey_of_16_bits_is_scaled(tmp_path):
    values = torch.tensor([[0, 128, 129, 257], [32896, 40000, 65406, 65535]], dtype=torch.uint16)
    path = saved(tmp_path / "a.png", Image.fromarray(values.numpy()))
    expected = (values.double() / 257).round().to(torch.uint8)
    assert torch.equal(read_picture(path, 1)[..., 0], expected)
    assert torch.equal(read_picture(path, 3), expected[..., None].expand(-1, -1, 3))


def test_a_transparent_value_of_16_bits_is_white(tmp_path):
    values = np.array([[0, 300], [300, 25700]], dtype=np.uint16)
    path = saved(tmp_path / "a.png", Image.fromarray(values), transparency=300)
    assert read_picture(path, 1)[..., 0].tolist() == [[0, 255], [255, 100]]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_no_known_range_are_refused(tmp_path, mode):
    path = tmp_path / "a.png"
    saved(path, Image.new(mode, (2, 2)), format="TIFF")
    with pytest.raises(ValueError, match=rf"a\.png must be an image: .* got mode '{mode}'"):
        read_picture(path, 3)


# Orientation


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(tmp_path, orientation, suffix):
    # The stored rows and columns of each orientation, by the EXIF specification.
    upright = grey() if suffix == ".png" else torch.full((HIGH, WIDE), 10, dtype=torch.uint8)
    upright[0, 0] = 250
    stored = upright.T if orientation > 4 else upright
    flips = {2: [1], 3: [0, 1], 4: [0], 6: [0], 7: [0, 1], 8: [1]}
    stored = stored.flip(flips.get(orientation, []))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if suffix == ".jpg" else {}
    path = saved(tmp_path / f"a{suffix}", picture(stored.contiguous()), exif=exif, **options)
    got = read_picture(path, 1)[..., 0]
    assert got.shape == upright.shape
    assert (got.int() - upright.int()).abs().max() <= (0 if suffix == ".png" else 12)


# Transparency


def test_transparent_pixels_are_composed_over_white(tmp_path):
    colour, alpha = grey(4)[..., :3].contiguous(), torch.zeros(HIGH, WIDE, dtype=torch.uint8)
    alpha[1], alpha[2] = 255, 51
    path = saved(tmp_path / "a.png", picture(torch.cat([colour, alpha[..., None]], -1)))
    share = alpha[..., None].double() / 255
    expected = share * colour + (1 - share) * 255
    got = read_picture(path, 3)
    assert (got - expected).abs().max() <= 1
    assert (got[0] == 255).all()
    assert torch.equal(got[1], colour[1])


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "LA"])
def test_other_ways_to_be_transparent(tmp_path, mode):
    """The left half is black and transparent, the right half is grey (or white)."""
    right = 255 if mode == "1" else 80
    image = Image.new("L", (4, 2))
    image.paste(right, (2, 0, 4, 2))
    options = {"transparency": (0, 0, 0) if mode == "RGB" else 0}
    if mode == "LA":
        image.putalpha(image.point(lambda v: 255 if v else 0))
        options = {}
    path = saved(tmp_path / "a.png", image.convert(mode), **options)
    assert read_picture(path, 1)[..., 0].tolist() == [[255, 255, right, right]] * 2


def test_a_palette_with_several_alphas(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 0, 0, 0, 200, 100, 0])
    image.putdata([0, 1, 2])
    path = saved(tmp_path / "a.png", image, transparency=bytes([255, 0, 0]))
    assert read_picture(path, 3).tolist() == [[[10, 20, 30], [255] * 3, [255] * 3]]


# Other kinds


def test_bits_are_black_and_white(tmp_path):
    path = saved(tmp_path / "a.png", picture(torch.tensor([[0, 255]], dtype=torch.uint8), "1"))
    assert read_picture(path, 3).tolist() == [[[0] * 3, [255] * 3]]


@pytest.mark.parametrize(
    ("ink", "colour"),
    [((0, 0, 0, 0), (255, 255, 255)), ((0, 0, 0, 255), (0, 0, 0)), ((255, 0, 0, 0), (0, 255, 255))],
)
def test_cmyk(tmp_path, ink, colour):
    path = saved(tmp_path / "a.jpg", Image.new("CMYK", (8, 8), ink), quality=100)
    difference = read_picture(path, 3).int() - torch.tensor(colour)
    assert difference.abs().max() <= 3


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp"])
def test_a_file_that_is_cut_off_is_named(tmp_path, suffix):
    noise = torch.randint(256, (64, 64, 3), generator=seeded(), dtype=torch.uint8)
    path = saved(tmp_path / f"whole{suffix}", picture(noise))
    content = path.read_bytes()
    path.rename(tmp_path / "whole")
    (tmp_path / f"cut{suffix}").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"cut\{suffix} must be an image: "):
        image_folder(tmp_path)


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_an_animation_is_refused(tmp_path, suffix):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    saved(tmp_path / f"a{suffix}", frames[0], save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=rf"a\{suffix} must be an image: .* an animation of 2"):
        image_folder(tmp_path)


def test_of_a_multi_picture_file_the_first_is_taken(tmp_path):
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("white", "black"))
    path = tmp_path / "a.jpg"
    first.save(path, format="MPO", save_all=True, append_images=[second])
    assert (read_picture(path, 3) == 255).all()


# Folders


@pytest.mark.parametrize("junk", [".ipynb_checkpoints/a.png", "__MACOSX/cat/._a.png", ".b/c/d.png"])
def test_what_other_programs_left_is_no_class(tmp_path, junk):
    for name in ("cat/a.png", "dog/a.png"):
        (tmp_path / name).parent.mkdir()
        saved(tmp_path / name, picture(grey()))
    left = [junk, f"cat/{junk}", "cat/._a.png", "._x.png", ".DS_Store"]
    for path in (tmp_path / name for name in left):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no image")
    (tmp_path / "dog" / "folder.png").mkdir()
    assert image_folder(tmp_path).labels.tolist() == [0, 1]


def test_a_folder_below_a_hidden_one_is_read(tmp_path):
    folder = tmp_path / ".cache" / "set"
    folder.mkdir(parents=True)
    saved(folder / "a.png", picture(grey()))
    assert len(image_folder(folder)) == 1


@pytest.mark.parametrize("size", [0, (4, -1)])
def test_sizes_are_positive(tmp_path, size):
    with pytest.raises(ValueError, match="size must be positive"):
        image_folder(tmp_path, size=size)


# Arrays


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_bytes_with_channels_first_or_last(tmp_path, channels):
    last = torch.randint(256, (2, 8, 9, channels), generator=seeded(), dtype=torch.uint8)
    for name, array in (("last", last), ("first", last.permute(0, 3, 1, 2))):
        np.save(tmp_path / f"{name}.npy", array.numpy())
        assert torch.equal(array_file(tmp_path / f"{name}.npy").images, from_bytes(last))


@pytest.mark.parametrize("shape", [(2, 32, 32, 32), (2, 5, 8, 8), (1, 8, 9, 5)])
def test_bytes_of_many_channels_are_refused(shape):
    with pytest.raises(ValueError, match=r"bytes of x must be \[N, H, W, C\] or \[N, C, H, W\]"):
        images_of(torch.zeros(shape, dtype=torch.uint8), None, 1.0, "x")


@pytest.mark.parametrize("shape", [(2, 32, 32, 3), (1, 28, 28, 1), (3, 5, 9, 4)])
def test_floating_point_with_channels_last_is_refused(shape):
    with pytest.raises(ValueError, match=r"which looks like \[N, H, W, C\]; permute"):
        images_of(torch.zeros(shape), None, 1.0, "x")


@pytest.mark.parametrize("shape", [(2, 32, 32, 32), (2, 128, 4, 4), (2, 3, 32, 32), (1, 4, 2, 3)])
def test_latents_of_any_channels_are_taken(shape):
    assert images_of(torch.zeros(shape), None, 1.0, "x").images.shape == shape


def test_pictures_of_two_kinds_in_a_data_set_are_named(monkeypatch):
    class Mixed:
        column_names = ("image",)

        def select_columns(self, names):
            return self

        def with_format(self, kind):
            return self

        def iter(self, batch_size):
            yield {"image": [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)]}

    fake = type("datasets", (), {"load_dataset": staticmethod(lambda name, split: Mixed())})
    monkeypatch.setitem(__import__("sys").modules, "datasets", fake)
    with pytest.raises(ValueError, match="image of x must have one size and number of channels"):
        hugging_face("x")
