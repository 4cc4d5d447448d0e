"""A save is one unit: whoever dies on the way leaves the earlier save or the new one."""

import os
import shutil
import threading
import time

import pytest
import torch

from dblocks.checkpoint import load_model, replacing, save_model, saving
from dblocks.models.vit import ViT, ViTConfig

SIZES = {"image_size": 8, "channels": 1, "patch_size": 4, "heads": 2, "conditioning": "none"}
FILES = {"config.json", "model.safetensors", "tokenizer.json"}


def make(width):
    return ViT(ViTConfig(width=width, depth=1, **SIZES))


def save(folder, width):
    save_model(folder, make(width), texts={"tokenizer.json": str(width)})


def dying(call, count, work):
    """Runs `work` in a process that ends, with no clean-up, before that call number `count`."""
    process = os.fork()
    if process == 0:
        try:
            original, seen = getattr(os, call), [0]

            def die(*args, **kwargs):
                seen[0] += 1
                if seen[0] == count:
                    os._exit(9)
                return original(*args, **kwargs)

            setattr(os, call, die)
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.parametrize(
    ("call", "count", "width"),
    [("fsync", 1, 8), ("fsync", 3, 8), ("rename", 1, 8)] + [("replace", n, 12) for n in (1, 2, 3)],
)
def test_a_process_that_dies_leaves_the_earlier_save_or_the_new_one(tmp_path, call, count, width):
    save(tmp_path, 8)
    assert dying(call, count, lambda: save(tmp_path, 12)) == 9
    assert load_model(tmp_path).config.width == width
    save(tmp_path, 16)
    assert {path.name for path in tmp_path.iterdir()} == FILES  # leftovers are gone
    assert load_model(tmp_path).config.width == 16
    assert (tmp_path / "tokenizer.json").read_text() == "16"


def test_writers_at_a_time_never_mix(tmp_path):
    def write(width):
        for _ in range(4):
            save(tmp_path, width)

    threads = [threading.Thread(target=write, args=(width,)) for width in (8, 12, 16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    width = load_model(tmp_path).config.width
    assert (tmp_path / "tokenizer.json").read_text() == str(width)
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_a_save_that_others_put_in_place_meanwhile_makes_room(tmp_path, monkeypatch):
    # The previous save is moved to its place between the failed rename and the next attempt.
    save(tmp_path, 8)
    (tmp_path / ".saved").mkdir()
    (tmp_path / ".saved" / "tokenizer.json").write_text("8")
    renames = []

    def rename(source, target, original=os.rename):
        renames.append(target)
        try:
            original(source, target)
        except OSError:
            shutil.rmtree(target)
            raise

    monkeypatch.setattr("dblocks.checkpoint.files._put_in_place", lambda folder: None)
    monkeypatch.setattr(os, "rename", rename)
    save(tmp_path, 12)
    monkeypatch.undo()
    assert len(renames) == 2
    assert load_model(tmp_path).config.width == 12


def test_a_living_writers_files_are_left(tmp_path):
    with saving(tmp_path) as part:
        (part / "a.txt").write_text("a")
        save(tmp_path, 8)
        assert (part / "a.txt").exists()
    assert (tmp_path / "a.txt").read_text() == "a"


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_full_disk_names_the_file_and_keeps_the_earlier_save(tmp_path, monkeypatch, file):
    save(tmp_path, 8)

    def full(path, *_args, **_options):
        raise OSError(28, "No space left on device", str(path))

    if file == "model.safetensors":
        monkeypatch.setattr("safetensors.torch.save_file", lambda *_, **__: full("no name"))
    else:
        monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match=r"cannot be written: .*No space left.*earlier save") as found:
        save(tmp_path, 12)
    assert file in str(found.value)
    assert str(tmp_path) in str(found.value)
    monkeypatch.undo()
    assert load_model(tmp_path).config.width == 8
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_one_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("old")

    def write():
        with replacing(path) as part:
            part.write_text("ne")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"run\.json cannot be written: .*an earlier one is kept"):
        write()
    assert path.read_text() == "old"
    with replacing(path) as one, replacing(path) as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_weights_are_those_that_were_saved(tmp_path):
    model = make(8)
    save_model(tmp_path, model)
    found = load_model(tmp_path).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())


def test_of_two_processes_that_check_and_commit_at_a_time_one_is_refused(tmp_path):
    """Each looks whether there is a file of another before its own becomes valid."""

    def job(number):
        def check():
            found = tmp_path / "shared.txt"
            time.sleep(0.2)  # both would find none
            if found.exists() and found.read_text() != str(number):
                os._exit(3)

        with saving(tmp_path, check) as part:
            (part / "shared.txt").write_text(str(number))
            (part / f"{number}.txt").write_text(str(number))
            (tmp_path / f"ready-{number}").touch()
            while len(list(tmp_path.glob("ready-*"))) < 2:
                time.sleep(0.001)

    started = []
    for number in range(2):
        process = os.fork()
        if process == 0:
            try:
                job(number)
            finally:
                os._exit(0)
        started.append(process)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in started]
    assert sorted(codes) == [0, 3]
    kept = codes.index(0)
    assert (tmp_path / "shared.txt").read_text() == str(kept)
    assert (tmp_path / f"{kept}.txt").exists()
    assert not (tmp_path / f"{1 - kept}.txt").exists()


def test_a_writer_that_dies_with_the_lock_leaves_none(tmp_path):
    assert dying("rename", 1, lambda: save(tmp_path, 8)) == 9
    save(tmp_path, 12)
    assert load_model(tmp_path).config.width == 12
