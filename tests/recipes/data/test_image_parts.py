"""Images that are in parts already: class folders, Tiny-ImageNet, data sets on disk, latents."""

import io
import shutil
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dblocks.recipes import dit
from dblocks.recipes.data import gather
from dblocks.recipes.data.batches import ImageData
from dblocks.recipes.data.image_files import from_bytes
from dblocks.recipes.data.images import load_images
from dblocks.recipes.data.splits import values
from dblocks.recipes.dit import DiTRun
from dblocks.recipes.metrics.images import standard_deviation
from dblocks.recipes.metrics.judge import train_judge
from tools import seeded


def pixels_of(n, *shape, seed=0):
    return torch.randint(256, (n, *shape), generator=seeded(seed), dtype=torch.uint8)


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy()).save(path)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "png")
    return file.getvalue()


# Folders of classes


def write_imagenet(folder, *, val="val", size=4):
    """Three classes of two images, of which two are in the other part; both parts' pixels."""
    training, held_out = pixels_of(6, size, size, 3), pixels_of(2, size, size, 3, seed=1)
    for i, name in enumerate(("n01", "n01", "n02", "n02", "n03", "n03")):
        write(folder / "train" / name / f"{i}.png", training[i])
    for i, name in enumerate(("n02", "n03")):
        write(folder / val / name / f"{i}.png", held_out[i])
    return training, held_out


@pytest.mark.parametrize("val", ["val", "test", "validation"])
def test_a_folder_in_parts_holds_out_its_own(tmp_path, val):
    parts = write_imagenet(tmp_path, val=val)
    training, held_out = load_images("imagenet", path=tmp_path)
    assert torch.equal(training.images, from_bytes(parts[0]))
    assert torch.equal(held_out.images, from_bytes(parts[1]))
    assert training.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert held_out.labels.tolist() == [1, 2]
    assert load_images(str(tmp_path), size=2)[1].images.shape == (2, 3, 2, 2)


def test_parts_of_a_folder_are_checked(tmp_path):
    write_imagenet(tmp_path)
    write(tmp_path / "val" / "n04" / "a.png", pixels_of(1, 4, 4, 3)[0])
    with pytest.raises(ValueError, match=r"n04 must be a class of train, and is not"):
        load_images("imagenet", path=tmp_path)
    shutil.rmtree(tmp_path / "val")
    write(tmp_path / "val" / "a.png", pixels_of(1, 4, 4, 3)[0])
    with pytest.raises(
        ValueError, match=r"val must hold a sub-folder for each class, as train does"
    ):
        load_images("imagenet", path=tmp_path)
    shutil.rmtree(tmp_path / "val")
    write(tmp_path / "val" / "n01" / "a.png", pixels_of(1, 5, 5, 3)[0])
    with pytest.raises(ValueError, match=r"one size, got \[4, 4\] and held out \[5, 5\]; give a"):
        load_images("imagenet", path=tmp_path)


def write_tiny(folder):
    """Tiny-ImageNet's own layout: two classes of two images, and two of val."""
    training, held_out = pixels_of(4, 64, 64, 3), pixels_of(2, 64, 64, 3, seed=1)
    for i in range(4):
        kind = f"n{i // 2}"
        write(folder / "train" / kind / "images" / f"{kind}_{i}.png", training[i])
        (folder / "train" / kind / f"{kind}_boxes.txt").touch()
    for i in range(2):
        write(folder / "val" / "images" / f"val_{i}.png", held_out[i])
    write(folder / "test" / "images" / "test_0.png", held_out[0])
    (folder / "wnids.txt").write_text("n1\nn0\n")
    lines = "val_1.png\tn0\t0\t0\t9\t9\nval_0.png\tn1\t0\t0\t9\t9\n"
    (folder / "val" / "val_annotations.txt").write_text(lines)
    return training, held_out


def test_tiny_imagenet_in_its_own_layout(tmp_path):
    parts = write_tiny(tmp_path / "tiny-imagenet-200")
    for path in (tmp_path, tmp_path / "tiny-imagenet-200"):
        training, held_out = load_images("tiny-imagenet", path=path)
        assert torch.equal(training.images, from_bytes(parts[0]))
        assert training.labels.tolist() == [0, 0, 1, 1]
        assert torch.equal(held_out.images, from_bytes(parts[1]))
        assert held_out.labels.tolist() == [1, 0]
    fit, validation = load_images("tiny-imagenet", "selection", path=tmp_path)
    assert len(fit) + len(validation) == 4


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", r"list exactly the images of .*images; val_0\.png is in one of them only"),
        ("val_0.png\tn0\n", r"val_1\.png is in one of them only"),
        ("val_0.png\tn0\nval_1.png\tn0\nval_2.png\tn0\n", r"val_2\.png is in one"),
        ("val_0.png\tn7\n", "line 1 of .*val_annotations.txt must be an image of val/images"),
        ("val_0.png\tn0\nval_0.png\tn1\n", "line 2 of"),
        ("../val_0.png\tn0\n", "line 1 of"),
        ("val_0.png n0\n", "got 'val_0.png n0'"),
        ("\xff", "must be UTF-8 text"),
    ],
)
def test_annotations_are_checked(tmp_path, lines, message):
    write_tiny(tmp_path)
    (tmp_path / "val" / "val_annotations.txt").write_text(lines, encoding="latin1")
    with pytest.raises(ValueError, match=message):
        load_images("tiny-imagenet", path=tmp_path)


# Data sets of Hugging Face on disk


def write_columns(path, pixels, labels, *, image="image", label="label", encode=None):
    pa = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [(encode or png)(p) for p in pixels]
    rows = [{"bytes": r, "path": None} for r in rows] if encode is None else rows
    table = pa.table({label: labels, "other": labels, image: rows})
    if path.suffix == ".parquet":
        pytest.importorskip("pyarrow.parquet").write_table(table, path)
        return
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"), {}),
        (("train/data-00000-of-00001.arrow", "test/data-00000-of-00001.arrow"), {}),
        (("a-train.parquet", "a-test.parquet"), {"image": "img", "label": "fine_label"}),
        (("a-train.parquet", "a-valid.parquet"), {"encode": png}),
    ],
)
def test_images_of_a_data_set(tmp_path, names, columns):
    pixels = pixels_of(8, 32, 32, 3)
    write_columns(tmp_path / names[0], pixels[:5], [0, 1, 2, 3, 9], **columns)
    write_columns(tmp_path / names[1], pixels[5:], [4, 5, 6], **columns)
    training, held_out = load_images("cifar-10", path=tmp_path)
    assert torch.equal(training.images, from_bytes(pixels[:5]))
    assert (training.labels.tolist(), held_out.labels.tolist()) == ([0, 1, 2, 3, 9], [4, 5, 6])
    assert torch.equal(held_out.images, from_bytes(pixels[5:]))


def test_a_data_set_without_a_test_part_is_split(tmp_path):
    pixels = pixels_of(20, 6, 6, 3)
    write_columns(tmp_path / "train.parquet", pixels, [i % 2 for i in range(20)])
    write_columns(tmp_path / "test.parquet", pixels[:2], [-1, -1])  # whose classes are not told
    training, held_out = load_images(str(tmp_path), size=4)
    assert (len(training), len(held_out)) == (14, 6)
    assert training.images.shape[1:] == (3, 4, 4)


def test_grey_pictures_of_a_name_stay_grey(tmp_path):
    pixels = pixels_of(4, 28, 28)
    write_columns(tmp_path / "train.parquet", pixels, [0, 1, 2, 3])
    write_columns(tmp_path / "test.parquet", pixels, [0, 1, 2, 3])
    assert torch.equal(load_images("fashion-mnist", path=tmp_path)[0].images, from_bytes(pixels))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": "picture"}, r"must have a column image or img, got \['label', 'other', 'pi"),
        ({"label": "kind"}, "must have a column label or fine_label or labels, got"),
        ({"labels": [0, -2]}, "must not be negative, got -2"),
        ({"labels": [0, None]}, "must be integers, without gaps"),
        ({"labels": [0.0, 1.0]}, "must be integers, without gaps"),
        ({"labels": [-1, -1]}, "must hold a class for each image, got only -1"),
        ({"labels": [0, 10]}, "labels of cifar-10 in .* must be below 10, got 10"),
        ({"shape": (31, 32, 3)}, r"images of cifar-10 in .* must be \[3, 32, 32\], got \[3, 31"),
        ({"encode": lambda pixels: b"none"}, "row 0 of 'image' in .* must be an image"),
        ({"encode": lambda pixels: png(pixels)[:-30]}, "row 0 of 'image' in .* must be an image"),
        ({"encode": lambda p: {"bytes": None, "path": "a"}}, "got a path only; embed the pictures"),
        ({"encode": lambda pixels: 3}, "must hold the bytes of a picture, got int"),
        ({"n": 0}, "must hold rows, got none"),
    ],
)
def test_columns_of_images_are_checked(tmp_path, options, message):
    labels, shape = options.pop("labels", [0, 1]), options.pop("shape", (32, 32, 3))
    n = options.pop("n", 2)
    write_columns(tmp_path / "train.parquet", pixels_of(n, *shape), labels[:n], **options)
    with pytest.raises(ValueError, match=message):
        load_images("cifar-10", path=tmp_path)


def test_without_pyarrow_its_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "train.arrow").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"`pip install 'dblocks\[parquet\]'`"):
        load_images("cifar-10", path=tmp_path)


# Large sets, mapped from a file


def test_large_sets_are_bytes_that_train_alike(tmp_path, cache, monkeypatch):
    write_imagenet(tmp_path)
    small = load_images("imagenet", path=tmp_path)[0]
    monkeypatch.setattr(gather, "IN_MEMORY", 0)
    large = load_images("imagenet", path=tmp_path)[0]
    assert (small.images.dtype, large.images.dtype) == (torch.float32, torch.uint8)
    assert torch.equal(values(large.images), small.images)
    batches = [ImageData(data, 4, seed=3).batch(2) for data in (small, large)]
    assert torch.equal(batches[0]["images"], batches[1]["images"])
    assert standard_deviation(large.images) == standard_deviation(small.images)
    # They are decoded once, and again after a change.
    times = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert torch.equal(load_images("imagenet", path=tmp_path)[0].images, large.images)
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == times
    smaller = load_images("imagenet", path=tmp_path, size=2)[0]
    assert smaller.images.shape == (6, 3, 2, 2)
    write(tmp_path / "train" / "n01" / "0.png", torch.zeros(4, 4, 3, dtype=torch.uint8))
    assert not load_images("imagenet", path=tmp_path)[0].images[0].any()


def test_a_run_on_bytes_is_that_on_numbers(tmp_path, monkeypatch, one_thread):
    write_imagenet(tmp_path)
    monkeypatch.setattr(dit, "judge_of", partial(train_judge, steps=2))
    sizes = {"steps": 3, "batch_size": 4, "depth": 3, "width": 8, "heads": 2, "samples": 3}
    run = DiTRun(data="imagenet", data_path=str(tmp_path), sampling_steps=3, points=1, **sizes)
    results = []
    for limit in (gather.IN_MEMORY, 0):
        monkeypatch.setattr(gather, "IN_MEMORY", limit)
        trainer = run.trainer()
        found = trainer.results(trainer.measure())
        del found["seconds_per_image"]
        results.append(found)
    assert results[0] == results[1]
    assert DiTRun.from_dict(run.to_dict()) == run
    assert "data_path" not in DiTRun().to_dict()


# Latents


def some_latents(n, seed=0):
    return torch.randn(n, 4, 2, 3, generator=seeded(seed)).half(), torch.arange(n) % 3


def write_latents(folder, kind, latents, labels, name="a"):
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "npz":
        np.savez(folder / f"{name}.npz", latents=latents.numpy(), labels=labels.numpy())
    elif kind == "safetensors":
        save_file({"latents": latents, "labels": labels}, folder / f"{name}.safetensors")
    else:
        labels_name = "labels" if name == "latents" else f"{name}-labels"
        np.save(folder / f"{name}.npy", latents.numpy())
        np.save(folder / f"{labels_name}.npy", labels.numpy())


@pytest.mark.parametrize("kind", ["npz", "safetensors", "npy"])
def test_latents_of_a_folder(tmp_path, kind):
    latents, labels = some_latents(9)
    write_latents(tmp_path / "train", kind, latents[:4], labels[:4], "a")
    write_latents(tmp_path / "train", kind, latents[4:], labels[4:], "b")
    write_latents(tmp_path / "val", kind, *some_latents(3, seed=1), "latents")
    training, held_out = load_images("imagenet-latents", path=tmp_path)
    assert training.images.dtype == torch.float16
    assert torch.equal(training.images, latents)
    assert torch.equal(training.labels, labels)
    assert torch.equal(held_out.images, some_latents(3, seed=1)[0])
    scaled, _ = load_images("imagenet-latents", path=tmp_path, scale=0.5)
    assert torch.equal(scaled.images, 0.5 * latents)


def test_latents_without_a_part_of_their_own_are_split(tmp_path):
    write_latents(tmp_path, "npy", *some_latents(30), "latents")
    training, held_out = load_images(str(tmp_path))
    assert (len(training), len(held_out)) == (21, 9)


def test_latents_are_checked(tmp_path):
    latents, labels = some_latents(4)

    def fails(message, **options):
        with pytest.raises(ValueError, match=message):
            load_images("imagenet-latents", path=tmp_path, **options)

    fails(r"must hold images \(.png, .* got none")
    np.savez(tmp_path / "a.npz", latents=latents.numpy())
    fails(r"a\.npz must also hold labels \[n\], got \['latents'\]")
    np.savez(tmp_path / "a.npz", latents=latents.numpy(), labels=labels.numpy()[:3])
    fails(r"each of 4 images, got torch.int64 \[3\]")
    np.savez(tmp_path / "a.npz", latents=latents.numpy(), labels=labels.numpy() + 998)
    fails(r"labels of imagenet-latents in .* must be below 1000, got 1000")
    write_latents(tmp_path, "npz", latents, labels)
    fails(r"size is for image files, got 4 with .*, whose latents have one", size=4)
    write_latents(tmp_path, "npz", latents[..., :2], labels, "b")
    fails(r"one shape and dtype, got \(\[4, 2, 3\], torch.float16\) and for b\.npz \(\[4, 2, 2\]")
    (tmp_path / "b.npz").unlink()
    np.save(tmp_path / "c.npy", latents.numpy())
    fails(r"c\.npy needs its labels in the same folder, in c-labels\.npy")
    (tmp_path / "c.npy").unlink()
    objects = np.array([{"a": 1}], dtype=object)
    np.savez(tmp_path / "a.npz", latents=objects, labels=labels.numpy(), allow_pickle=True)
    fails(r"a\.npz cannot be read as an array: ")
    (tmp_path / "a.npz").unlink()
    write_latents(tmp_path, "safetensors", latents, labels)
    content = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(content[:-5])
    fails(r"a\.safetensors cannot be read as a safetensors file: ")
