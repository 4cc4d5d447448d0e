import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from dblocks.recipes.data import digits, hub
from dblocks.recipes.data.image_files import array_file, from_bytes, image_folder
from dblocks.recipes.data.images import load_images
from tools import seeded


def pixels_of(n, *shape, seed=0):
    return torch.randint(256, (n, *shape), generator=seeded(seed), dtype=torch.uint8)


def write_folder(folder, pixels, names):
    """PNG files, one for each name."""
    for array, name in zip(pixels, names, strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array.numpy()).save(path)


def test_bytes_span_minus_one_to_one():
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    assert from_bytes(pixels).flatten().tolist() == [-1, 1]
    pixels = pixels_of(3, 4, 5, 3)
    images = from_bytes(pixels)
    assert images.shape == (3, 3, 4, 5)
    torch.testing.assert_close((images + 1) * 127.5, pixels.permute(0, 3, 1, 2).float())
    assert from_bytes(pixels[..., 0]).shape == (3, 1, 4, 5)
    with pytest.raises(ValueError, match=r"uint8 .* got torch.float32 \[3, 3, 4, 5\]"):
        from_bytes(images)


# Folders


def test_sub_folders_are_classes(tmp_path):
    pixels = pixels_of(4, 4, 5, 3)
    write_folder(tmp_path, pixels, ["cat/b.png", "cat/a.PNG", "dog/x/deep.png", "ant/1.png"])
    (tmp_path / "dog" / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    found = image_folder(tmp_path)
    assert found.labels.tolist() == [0, 1, 1, 2]
    assert torch.equal(found.images, from_bytes(pixels[torch.tensor([3, 1, 0, 2])]))
    grey = image_folder(tmp_path, channels=1)
    assert grey.images.shape == (4, 1, 4, 5)


def test_loose_images_are_of_one_class(tmp_path):
    pixels = pixels_of(2, 4, 4)
    write_folder(tmp_path, pixels, ["a.png", "b.png"])
    found = image_folder(tmp_path, channels=1)
    assert found.labels.tolist() == [0, 0]
    assert torch.equal(found.images, from_bytes(pixels))


def test_images_are_scaled_and_cropped_at_the_centre(tmp_path):
    # Red in the middle third, which a square crop of the wide image keeps.
    wide = torch.zeros(1, 4, 12, 3, dtype=torch.uint8)
    wide[:, :, 4:8, 0] = 255
    write_folder(tmp_path, wide, ["a.png"])
    write_folder(tmp_path, pixels_of(1, 9, 9, 3), ["b.png"])
    with pytest.raises(ValueError, match=r"one size, got \[4, 12\] and for b.png \[9, 9\]; give a"):
        image_folder(tmp_path)
    found = image_folder(tmp_path, size=4)
    assert found.images.shape == (2, 3, 4, 4)
    assert torch.equal(found.images[0], from_bytes(wide[:, :, 4:8])[0])
    assert image_folder(tmp_path, size=(2, 6)).images.shape == (2, 3, 2, 6)


def test_folders_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"must hold images \(.png, .* got none"):
        image_folder(tmp_path)
    with pytest.raises(ValueError, match="must be a folder of images, and is not a folder"):
        image_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="channels must be 1 or 3, got 4"):
        image_folder(tmp_path, channels=4)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png must be an image"):
        image_folder(tmp_path)
    write_folder(tmp_path, pixels_of(1, 4, 4), ["class/a.png"])
    with pytest.raises(ValueError, match=r"got both; move broken\.png into the folder"):
        image_folder(tmp_path)


def test_without_pillow_it_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path, pixels_of(1, 4, 4), ["a.png"])
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match="need the package Pillow, which is not installed"):
        image_folder(tmp_path)


# Arrays


def test_latents_of_a_file(tmp_path):
    latents = torch.randn(6, 4, 2, 3, generator=seeded()).half()
    np.save(tmp_path / "a.npy", latents.numpy())
    found = array_file(tmp_path / "a.npy")
    assert found.images.dtype == torch.float16
    assert torch.equal(found.images, latents)
    assert found.labels.tolist() == [0] * 6
    labels = np.array([0, 1, 2, 0, 1, 2], dtype=np.int32)
    np.savez(tmp_path / "b.npz", latents=latents.float().numpy(), labels=labels)
    found = array_file(tmp_path / "b.npz", scale=0.18215)
    assert torch.equal(found.images, latents.float() * 0.18215)
    assert found.labels.tolist() == labels.tolist()
    assert found.labels.dtype == torch.int64


def test_pixels_of_a_file(tmp_path):
    pixels = pixels_of(3, 4, 5, 3)
    np.savez(tmp_path / "a.npz", images=pixels.numpy(), labels=[2, 1, 0])
    assert torch.equal(array_file(tmp_path / "a.npz").images, from_bytes(pixels))
    with pytest.raises(ValueError, match="scale needs floating-point values"):
        array_file(tmp_path / "a.npz", scale=7.0)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(3)}, r"one of the arrays 'images' and 'latents', got \['x'\]"),
        ({"images": np.zeros((2, 3, 4))}, r"got torch.float64 \[2, 3, 4\]"),
        ({"images": np.zeros((2, 3, 4, 4), dtype=np.int64)}, "got torch.int64"),
        ({"images": np.array(["a", "b"])}, "one array of numbers"),
        ({"images": np.zeros((2, 1, 4, 4)), "labels": [0]}, r"each of 2 images, got .* \[1\]"),
        ({"images": np.zeros((2, 1, 4, 4)), "labels": [0.5, 1.0]}, "got torch.float64"),
        ({"images": np.zeros((2, 1, 4, 4)), "labels": [0, -1]}, "not be negative, got -1"),
    ],
)
def test_arrays_are_checked(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        array_file(tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"no array"])
def test_a_broken_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} cannot be read as an array"):
        array_file(tmp_path / name)
    with pytest.raises(ValueError, match=r"nothing\.npy cannot be read as an array"):
        array_file(tmp_path / "nothing.npy")


# Packages that are not installed here stand in with the parts of them that are called.


class FakeDataset:
    """The parts of datasets.Dataset that are called."""

    def __init__(self, columns):
        self.columns = columns

    @property
    def column_names(self):
        return list(self.columns)

    def select_columns(self, names):
        return FakeDataset({name: self.columns[name] for name in names})

    def with_format(self, kind):
        assert kind == "numpy"
        return self

    def iter(self, batch_size):
        n = len(next(iter(self.columns.values())))
        for i in range(0, n, batch_size):
            yield {k: np.asarray(v[i : i + batch_size]) for k, v in self.columns.items()}


def test_latents_of_hugging_face(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="Hugging Face need the package datasets, which is not"):
        load_images("hf:some/latents")
    latents = torch.randn(30, 4, 2, 2, generator=seeded()).numpy()
    columns = {"latents": latents, "label": np.arange(30) % 3, "text": ["a"] * 30}
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return FakeDataset(columns)

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(hub, "ROWS_AT_A_TIME", 7)
    found = hub.hugging_face("some/latents", scale=0.5)
    assert asked == [("some/latents", "train")]
    torch.testing.assert_close(found.images, torch.from_numpy(latents) * 0.5)
    assert found.labels.tolist() == [i % 3 for i in range(30)]
    training, held_out = load_images("hf:some/latents", scale=0.5)
    assert (len(training), len(held_out)) == (21, 9)
    assert not hub.hugging_face("some/latents", label="none").labels.any()
    with pytest.raises(
        ValueError, match=r"must have one of the columns \('text2',\), got \['latents'"
    ):
        hub.hugging_face("some/latents", image="text2")


# By name


def test_load_images_tells_sources_apart(tmp_path):
    training, held_out = load_images("digits")
    assert torch.equal(training.images, digits.digits()[0].images)
    assert len(held_out) == 539
    write_folder(tmp_path / "f", pixels_of(20, 4, 4), [f"{i % 2}/{i}.png" for i in range(20)])
    training, held_out = load_images(str(tmp_path / "f"), "selection", size=2)
    assert (len(training), len(held_out)) == (12, 2)
    assert training.images.shape[1:] == (3, 2, 2)
    np.save(tmp_path / "a.npy", np.ones((10, 4, 2, 2)))
    training, _ = load_images(str(tmp_path / "a.npy"), scale=3.0)
    assert (training.images == 3).all()


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("mnist", {}, r"data must be digits, fashion-mnist, cifar-10, .* got 'mnist'"),
        ("digits", {"size": 4}, "size is for image files, got 4 with 'digits'"),
        ("digits", {"scale": 2.0}, "scale is for arrays and latents, got 2.0 with 'digits'"),
        (
            "digits",
            {"path": "x"},
            "a path can be given for fashion-mnist, cifar-10, .* got x with 'digits'",
        ),
        ("cifar-10", {}, "cifar-10 needs its files: .* by --data-path"),
        ("cifar-10", {"path": "nowhere"}, "nowhere must be a file or folder of cifar-10, and does"),
    ],
)
def test_load_images_is_checked(source, options, message):
    with pytest.raises(ValueError, match=message):
        load_images(source, **options)
