"""CIFAR-10 and CIFAR-100, in both versions."""

import os
import pickle

import numpy as np
import pytest
import torch

from dblocks.recipes.data.image_files import from_bytes
from dblocks.recipes.data.images import load_images
from dblocks.recipes.data.pickles import read_pickle
from tools import seeded


def some_bytes(*shape, below=256, seed=0):
    return torch.randint(below, shape, generator=seeded(seed), dtype=torch.uint8)


def same(images, part):
    pixels, labels = part
    assert torch.equal(images.images, from_bytes(pixels))
    assert torch.equal(images.labels, labels.long())


CIFARS = {10: [f"data_batch_{i}.bin" for i in range(1, 6)], 100: ["train.bin"]}
TESTS = {10: "test_batch.bin", 100: "test.bin"}


def write_cifar(folder, classes):
    """Tiny files of the binary version; training and test images as (pixels, labels)."""
    parts = []
    for names in (CIFARS[classes], [TESTS[classes]]):
        pixels = some_bytes(4 * len(names), 3, 32, 32, seed=len(names))
        labels = some_bytes(len(pixels), below=classes, seed=1)
        head = labels[:, None] if classes == 10 else torch.stack([labels // 5, labels], 1)
        rows = torch.cat([head, pixels.flatten(1)], 1)
        for name, chunk in zip(names, rows.split(4), strict=True):
            (folder / name).write_bytes(chunk.numpy().tobytes())
        parts.append((pixels.permute(0, 2, 3, 1), labels))
    return parts


@pytest.mark.parametrize("classes", [10, 100])
def test_cifars_binary_version(tmp_path, classes):
    (tmp_path / "batches.meta.txt").touch()
    parts = write_cifar(tmp_path, classes)
    for images, part in zip(load_images(str(tmp_path)), parts, strict=True):
        same(images, part)


@pytest.fixture(name="load_after")
def _load_after(tmp_path):
    def load(name, content, classes=10):
        write_cifar(tmp_path, classes)
        path = tmp_path / name
        path.unlink() if content is None else path.write_bytes(content)
        return load_images(str(tmp_path))

    return load


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "images of 3073 bytes each, .* CIFAR-10, got 0 bytes"),
        (bytes(3073 * 2 - 1), "got 6145 bytes; it may be cut off"),
        (b"\x0a" + bytes(3072), "labels below 10, got 10"),
    ],
)
@pytest.mark.parametrize("name", ["data_batch_5.bin", "test_batch.bin"])
def test_a_damaged_cifar_file_is_named(load_after, name, content, message):
    with pytest.raises(ValueError, match=f"{name} .*{message}"):
        load_after(name, content)


def test_a_damaged_file_of_cifar_100_is_named(load_after):
    with pytest.raises(ValueError, match=r"test\.bin .*3074 bytes each, .* CIFAR-100, got 3073"):
        load_after("test.bin", bytes(3073), classes=100)


# The Python version: as torchvision keeps it, pickles of Python 2


PYTHON = {10: [f"data_batch_{i}" for i in range(1, 6)], 100: ["train"]}
PYTHON_TESTS = {10: "test_batch", 100: "test"}
FOLDERS = {10: "cifar-10-batches-py", 100: "cifar-100-python"}
LABELS = {10: "labels", 100: "fine_labels"}


def write_python(folder, classes, *, protocol=2, key=str.encode):
    """Tiny files of the Python version; training and test images as (pixels, labels)."""
    parts = []
    folder.mkdir(parents=True)
    for names in (PYTHON[classes], [PYTHON_TESTS[classes]]):
        pixels = some_bytes(4 * len(names), 3, 32, 32, seed=len(names))
        labels = some_bytes(len(pixels), below=classes, seed=1)
        for i, name in enumerate(names):
            some = slice(4 * i, 4 * i + 4)
            found = {
                key("batch_label"): b"a batch",
                key(LABELS[classes]): labels[some].tolist(),
                key("data"): pixels[some].flatten(1).numpy(),
                key("filenames"): [b"a.png"] * 4,
            }
            (folder / name).write_bytes(pickle.dumps(found, protocol=protocol))
        parts.append((pixels.permute(0, 2, 3, 1), labels))
    (folder / ("meta" if classes == 100 else "batches.meta")).write_bytes(pickle.dumps({}))
    return parts


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("options", [{}, {"key": str}, {"protocol": 4}])
def test_cifars_python_version(tmp_path, classes, options):
    folder = tmp_path / FOLDERS[classes]
    parts = write_python(folder, classes, **options)
    for path in (tmp_path, folder):
        found = load_images(f"cifar-{classes}", path=path)
        for images, part in zip(found, parts, strict=True):
            same(images, part)
    same(load_images(str(folder))[0], parts[0])


def of_python_2(pixels, labels):
    """What Python 2 and numpy 1 wrote: texts are bytes, and protocol 0 names the old modules."""
    body = pixels.numpy().tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01bt(I1\n(I%d\nI3072\n"
        b"tcnumpy\ndtype\n(U\x02u1I0\nI1\ntR(I3\nU\x01|NNNI-1\nI-1\nI0\ntbI00\nT%stb"
    )
    array = array.replace(b"bt(I1", b"btR(I1") % (
        len(pixels),
        len(body).to_bytes(4, "little") + body,
    )
    listed = b"(" + b"".join(b"I%d\n" % n for n in labels.tolist()) + b"l"
    return b"(U\x04data" + array + b"U\x06labels" + listed + b"d."


def test_a_pickle_of_python_2(tmp_path):
    parts = write_python(tmp_path / "a", 10)
    pixels, labels = some_bytes(4, 3072), torch.tensor([3, 1, 9, 0])
    (tmp_path / "a" / "test_batch").write_bytes(of_python_2(pixels, labels))
    training, held_out = load_images("cifar-10", path=tmp_path / "a")
    same(training, parts[0])
    same(held_out, (pixels.view(4, 3, 32, 32).permute(0, 2, 3, 1), labels))


class _Calls:
    """Pickled, calls a function with arguments."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def _trap(*_):
    pytest.fail("a pickle was run")


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (_Calls(_trap, "x"), r"\w*test_cifar._trap"),
        (_Calls(os.system, "true"), r"\w+.system"),
        (_Calls(eval, "1"), r"\w+.eval"),
        (_Calls(np.load, "x"), r"numpy.load"),
        (_Calls(getattr, np, "load"), ""),
        (pickle.loads, r"\w*ickle.loads"),
        (_trap, r"\w*test_cifar._trap"),
        (np.float64, "numpy.float64"),
        (np.arange(3).view(np.matrix), ""),
        ({"data": {1, _trap}}, ""),
    ],
)
def test_a_pickle_that_names_anything_else_is_refused_unrun(tmp_path, value, name, protocol):
    path = tmp_path / "a"
    try:
        path.write_bytes(pickle.dumps({"data": value}, protocol=protocol))
    except (TypeError, pickle.PicklingError):
        return  # a module, which no pickle holds
    message = rf"a must be a pickle of a dictionary of arrays: it names .*{name}"
    with pytest.raises(ValueError, match=message):
        read_pickle(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        pickle.dumps({"data": b"x" * 99})[:-9],
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # says that it is of 2^63 bytes
        b"cnumpy\nndarray\n}b.",  # sets the state of a class
        b"cnumpy\nload\n.",
        b"c_codecs\nencode.__call__\n.",
        b"\x80\x02\x82\x01.",  # an extension
        b"P0\n.",  # an object outside
        b"(" * 5000 + b"t" * 4999 + b".",
    ],
)
def test_a_broken_pickle_is_named(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match="a must "):
        read_pickle(tmp_path / "a")


GOOD = np.zeros((2, 3072), dtype=np.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": GOOD[:, :9]}, r"image of 3072 bytes for each of 2 labels, got \[2, 9\]"),
        ({"data": GOOD[:1]}, r"each of 2 labels, got \[1, 3072\]"),
        ({"data": GOOD.astype(np.int32)}, r"array of bytes .* got \(2, 3072\) of 'i4'"),
        ({"data": GOOD.astype(object)}, "of 'O8'"),
        ({"data": GOOD.view([("a", "u1")])}, "of 'V1'"),
        ({"data": np.asfortranarray(GOOD)}, "row by row"),
        ({"data": GOOD[0]}, r"in 2 dimensions, row by row, got \(3072,\)"),
        ({"data": [1, 2]}, "must be an array, got list"),
        ({"data": None}, "must be an array, got NoneType"),
        ({"labels": [1, 10]}, "labels below 10, got 10; it may be damaged"),
        ({"labels": [-1, 1]}, "labels below 10, got -1"),
        ({"labels": [1, 2**70]}, "labels below 10, got more"),
        ({"labels": [1, True]}, "must be a list of integers, got list of other values"),
        ({"labels": np.array([1, 2])}, "must be a list of integers, got Array"),
        ({"labels": []}, "each of 0 labels"),
        (None, r"must hold 'data', got \['labels'\]"),
        ([1], "must hold a dictionary, got list"),
    ],
)
def test_the_contents_of_a_pickle_are_checked(tmp_path, change, message):
    write_python(tmp_path / "a", 10)
    found = {"data": GOOD, "labels": [1, 2]}
    found = change if isinstance(change, list) else found | (change or {})
    if change is None:
        del found["data"]
    (tmp_path / "a" / "test_batch").write_bytes(pickle.dumps(found, protocol=2))
    with pytest.raises(ValueError, match=rf"test_batch.*{message}"):
        load_images("cifar-10", path=tmp_path / "a")


def test_an_array_has_the_bytes_of_its_shape(tmp_path):
    write_python(tmp_path / "a", 10)
    content = of_python_2(some_bytes(4, 3072), torch.tensor([1, 2, 3, 4]))
    content = content.replace(b"I4\nI3072", b"I5\nI3072")
    (tmp_path / "a" / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match=r"as its shape \[5, 3072\] says, got 12288"):
        load_images("cifar-10", path=tmp_path / "a")


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch"])
def test_a_missing_file_of_the_python_version_is_named(tmp_path, name):
    write_python(tmp_path / "a", 10)
    (tmp_path / "a" / name).unlink()
    with pytest.raises(ValueError, match=f"{name} must be a pickle .* No such file"):
        load_images("cifar-10", path=tmp_path / "a")
