"""Augmentation: RandAugment against Pillow, crops by their definition, and what it depends on."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from dblocks.recipes.data.augment import Augment, padded_crop, resized_crop
from dblocks.recipes.data.batches import ImageData
from dblocks.recipes.data.rand_augment import OPERATIONS, rand_augment
from dblocks.recipes.data.splits import Images, from_bytes

H, W = 20, 26
MAGNITUDE = 9 / 30
COLOUR = 0.9 * MAGNITUDE


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n=4, channels=3, h=H, w=W):
    """Bytes, smooth and noisy ones, one of few levels."""
    draws = torch.rand(n, channels, h, w, generator=generator(1)) * 60
    ramp = torch.linspace(20, 180, w) + torch.linspace(0, 15, h)[:, None]
    pixels = (draws + ramp).floor()
    pixels[0] = (pixels[0] / 64).floor() * 64
    return pixels


def moved(image, matrix):
    nearest = Image.Resampling.NEAREST
    return image.transform(image.size, Image.Transform.AFFINE, matrix, nearest)


def of_pillow(name, image, sign):
    """The operation on a Pillow image, by its own functions."""
    shear, factor = 0.3 * MAGNITUDE * sign, 1 + COLOUR * sign
    shift_x, shift_y = (int(150 / 331 * side * MAGNITUDE) * sign for side in (W, H))
    return {
        "identity": lambda: image,
        "shear_x": lambda: moved(image, (1, shear, 0, 0, 1, 0)),
        "shear_y": lambda: moved(image, (1, 0, 0, shear, 1, 0)),
        "translate_x": lambda: moved(image, (1, 0, shift_x, 0, 1, 0)),
        "translate_y": lambda: moved(image, (1, 0, 0, 0, 1, shift_y)),
        "rotate": lambda: image.rotate(30 * MAGNITUDE * sign),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(factor),
        "color": lambda: ImageEnhance.Color(image).enhance(factor),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(factor),
        "posterize": lambda: ImageOps.posterize(image, 7),
        "solarize": lambda: ImageOps.solarize(image, 178.5),
        "auto_contrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
    }[name]()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_those_of_pillow(name, sign):
    pixels = pictures()
    got = OPERATIONS[name](pixels, torch.full((len(pixels),), float(sign)))
    assert got.min() >= 0
    assert got.max() <= 255
    for image, found in zip(pixels, got, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).byte().numpy())
        expected = torch.from_numpy(np.array(of_pillow(name, picture, sign))).permute(2, 0, 1)
        # Rounding to a level and, of a rotation, to the nearest pixel may differ at a tie.
        apart = (found - expected).abs() > 1
        assert apart.float().mean() <= (0.01 if name == "rotate" else 0)


def test_every_operation_is_drawn_as_often():
    pixels = pictures(1).repeat(600, 1, 1, 1)
    once = {name: op(pixels[:1], torch.ones(1)) for name, op in OPERATIONS.items()}
    changed = rand_augment(pixels / 127.5 - 1, generator())
    # Two of 14 that leave every image as it is: 1 in 196.
    same = (((changed + 1) * 127.5 - pixels).abs() < 1e-3).all((1, 2, 3)).float().mean()
    assert 0 < same < 0.05
    assert len(once) == 14
    grey = rand_augment(pictures(30, 1) / 127.5 - 1, generator())
    assert grey.shape == (30, 1, H, W)
    assert grey.abs().max() <= 1


def test_padded_crops_are_the_image_moved_by_up_to_4():
    images = pictures(64, 1, 6, 7) / 127.5 - 1
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4), value=-1.0)
    shifts = set()
    for i, found in enumerate(padded_crop(images, generator())):
        places = [(y, x) for y in range(9) for x in range(9)]
        cuts = {p: padded[i, :, p[0] : p[0] + 6, p[1] : p[1] + 7] for p in places}
        matching = [p for p, cut in cuts.items() if torch.equal(cut, found)]
        assert matching
        shifts |= set(matching)
    assert {y for y, _ in shifts} == {x for _, x in shifts} == set(range(9))


def test_resized_crops_are_parts_of_the_image():
    size = 32
    ramps = torch.linspace(-1, 1, size).expand(500, 1, size, size)
    across = resized_crop(ramps, generator())
    down = resized_crop(ramps.transpose(2, 3), generator())
    assert across.min() >= -1
    assert across.max() <= 1
    # Away from the edges a crop of a ramp is a ramp; its slope is the share of the side.
    widths = (across[:, 0, 9, 20] - across[:, 0, 9, 10]) * (size - 1) / 20
    heights = (down[:, 0, 20, 9] - down[:, 0, 10, 9]) * (size - 1) / 20
    areas, ratios = widths * heights, widths / heights
    assert areas.min() > 0.07
    assert areas.max() <= 1.001
    # Draws that fit: of areas a up to m, e^-|u| for a ratio e^u; (E m^2 - .08^2)/2 / (E m - .08).
    assert areas.mean() == pytest.approx(0.478, abs=0.04)
    assert 0.7 < ratios.min() < 0.85
    assert 1.2 < ratios.max() < 1.45


@pytest.mark.parametrize("crop", ["none", "pad", "resize"])
def test_what_happens_depends_on_seed_step_and_place_alone(crop):
    augment = Augment(crop, flip=True, rand_augment=True)
    images = pictures(8) / 127.5 - 1
    once = augment(images, seed=3, step=7)
    assert torch.equal(once, augment(images, seed=3, step=7))
    for other in ({"seed": 4, "step": 7}, {"seed": 3, "step": 8}):
        assert not torch.equal(once, augment(images, **other))
    mixed = images.clone()
    mixed[3:] = 0.5
    assert torch.equal(once[:3], augment(mixed, seed=3, step=7)[:3])
    assert Augment()(images, seed=3, step=7) is images


def test_half_of_the_images_are_flipped():
    images = pictures(200, 1) / 127.5 - 1
    found = Augment(flip=True)(images, seed=0, step=0)
    same = (found == images).all((1, 2, 3))
    assert torch.equal(found[~same], images[~same].flip(3))
    assert 70 < same.sum() < 130


def test_batches_of_bytes_and_of_numbers_are_the_same():
    pixels = pictures(12).byte()
    labels = torch.arange(12)
    augment = Augment("pad", True, True)
    some = [
        ImageData(Images(images, labels), 6, 3, augment).batch(5)["images"]
        for images in (pixels, from_bytes(pixels.permute(0, 2, 3, 1)))
    ]
    assert torch.equal(*some)
    assert not torch.equal(some[0], ImageData(Images(pixels, labels), 6, 3).batch(5)["images"])


@pytest.mark.parametrize(("channels", "high"), [(4, 1.0), (3, 2.5)])
def test_latents_are_refused(channels, high):
    images = torch.full((4, channels, 8, 8), high)
    data = Images(images, torch.arange(4))
    with pytest.raises(ValueError, match=r"rand_augment needs images of 1 or 3 channels"):
        ImageData(data, 2, 0, Augment(rand_augment=True))
    ImageData(data, 2, 0, Augment(flip=True))


@pytest.mark.parametrize(("h", "w"), [(1, 6), (2, 2), (5, 2)])
def test_an_image_without_inner_pixels_is_sharp_as_it_is(h, w):
    pixels = pictures(h=h, w=w)
    image = Image.fromarray(pixels[1].byte().permute(1, 2, 0).contiguous().numpy())
    wanted = np.asarray(ImageEnhance.Sharpness(image).enhance(1 + COLOUR))
    found = OPERATIONS["sharpness"](pixels, torch.ones(len(pixels)))
    assert (found[1].permute(1, 2, 0).byte().numpy() == wanted).all()
