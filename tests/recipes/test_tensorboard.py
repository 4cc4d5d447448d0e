"""The curve of a run as files of TensorBoard."""

import sys

import pytest

from dblocks.__main__ import main
from dblocks.recipes.tensorboard import Board, scalars

VIT = ("train", "vit", "--steps", "4", "--batch-size", "8", "--width", "12", "--depth", "3")
VIT += ("--heads", "2", "--points", "2")


def test_numbers_of_a_point_have_names():
    point = {"step": 7, "block_loss": [0.5, None], "accuracy": 1, "by": {"3": 0.25}, "text": "a"}
    assert dict(scalars(point)) == {"block_loss/0": 0.5, "accuracy": 1.0, "by/3": 0.25}


def test_without_tensorboard_the_extra_is_named_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    flags = ("--out", str(tmp_path / "out"), "--tensorboard", str(tmp_path / "board"))
    assert main([*VIT, *flags]) == 2
    assert "pip install 'dblocks[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "board").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_points_are_in_the_files(tmp_path, one_thread):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ("--out", str(tmp_path / "out"), "--tensorboard", str(tmp_path / "board"))
    assert main([*VIT, *flags, "--block", "1"]) == 0
    Board(tmp_path / "board" / "block-1").add({"step": 9, "accuracy": 0.5})
    found = EventAccumulator(str(tmp_path / "board" / "block-1")).Reload()
    assert [event.step for event in found.Scalars("accuracy")] == [9]
    assert "layer_evaluations" in found.Tags()["scalars"]
