"""`dblocks train ... --resident`: the bits of the run without it."""

import json
import shutil

import pytest

from dblocks.__main__ import main
from dblocks.recipes.vit import ViTRun

pytestmark = pytest.mark.usefixtures("one_thread")
VIT = ("train", "vit", "--steps", "12", "--batch-size", "8", "--width", "12", "--depth", "2")
VIT += ("--heads", "2", "--points", "2", "--blocks", "2")


def train(out, *flags):
    assert main([*VIT, "--out", str(out), *flags]) == 0
    return (out / "model.safetensors").read_bytes()


def interrupted(folder, to):
    shutil.copytree(folder, to)
    shutil.rmtree(to / "checkpoints/step-00000012")


def test_bits_are_those_of_the_run_without(tmp_path):
    plain = train(tmp_path / "plain")
    flags = ("--resident", "--prefetch", "all", "--host", "file", "--checkpoint-every", "6")
    assert train(tmp_path / "resident", *flags) == plain
    # Where things are is no part of a run: it goes on without.
    interrupted(tmp_path / "resident", tmp_path / "again")
    assert train(tmp_path / "again", "--resume") == plain
    record = json.loads((tmp_path / "resident/run.json").read_text())["run"]
    assert (record["resident"], record["host"]) == (True, "file")


def test_visits_go_on_where_they_were(tmp_path, capsys):
    flags = ("--resident", "--steps-per-visit", "4")
    once = train(tmp_path / "once", *flags, "--checkpoint-every", "6")
    interrupted(tmp_path / "once", tmp_path / "again")
    assert train(tmp_path / "again", *flags, "--resume") == once
    capsys.readouterr()
    assert main([*VIT, "--out", str(tmp_path / "again"), "--resident", "--resume"]) == 2
    assert "run.steps_per_visit was 4 and is None" in capsys.readouterr().err


def test_a_block_alone_is_resident_already(tmp_path):
    for name, flags in (("plain", ()), ("resident", ("--resident",))):
        assert main([*VIT, "--block", "1", "--out", str(tmp_path / name), *flags]) == 0
    one, other = (tmp_path / n / "block-1/model.safetensors" for n in ("plain", "resident"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps_per_visit": 2}, "steps_per_visit must be left out without resident=True, got 2"),
        ({"prefetch": "all"}, "prefetch must be left out without resident"),
        ({"host": "file"}, "host must be left out without resident"),
        ({"resident": True, "steps_per_visit": 0}, "steps_per_visit must be positive, got 0"),
        ({"resident": True, "end_to_end": True}, "resident must be left out end to end"),
        (
            {"resident": True, "steps_per_visit": 2, "block": 0},
            "steps_per_visit must be left out if one block is trained alone",
        ),
    ],
)
def test_flags_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        ViTRun(**options)


def test_records_of_runs_without_hold_nothing_new():
    assert not {"resident", "sharding", "steps_per_visit"} & ViTRun().to_dict().keys()
    resident = ViTRun(resident=True, sharding="fsdp", steps_per_visit=2)
    assert ViTRun.from_dict(resident.to_dict()) == resident
    assert resident.settings() == ViTRun().to_dict() | {"steps_per_visit": 2}
    assert ViTRun(block=0).settings() == ViTRun().to_dict() | {"block": 0}
