import sys
from pathlib import Path

import pytest

from dblocks.plots import Curve, comparison_figure, save_png
from dblocks.schedule import NoiseSchedule

CURVES = [
    Curve(label="whole", layer_evaluations=[500, 1000], accuracies=[[0.5, 0.9], [0.6, 0.92]]),
    Curve(label="blocks", layer_evaluations=[500, 1000], accuracies=[[0.7, 0.95]]),
]
LAYERS = [(0, 4), (4, 8), (8, 12)]


def figure(curves=CURVES):
    return comparison_figure(curves, NoiseSchedule(), 3, LAYERS, title="Digits")


def test_png_is_written(tmp_path: Path):
    path = save_png(figure(), tmp_path / "new" / "figure.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_left_panel_is_accuracy_against_layer_evaluations():
    left, _ = figure().axes
    assert "layer evaluations" in left.get_xlabel()
    assert "accuracy (%)" in left.get_ylabel()
    assert [t.get_text() for t in left.get_legend().get_texts()] == [
        "whole: 91.0 %",
        "blocks: 95.0 %",
    ]
    line = left.get_lines()[0]
    assert list(line.get_xdata()) == [0.5, 1.0]
    assert list(line.get_ydata()) == pytest.approx([55, 91])


def test_right_panel_names_every_block_on_a_log_axis():
    _, right = figure().axes
    assert right.get_xscale() == "log"
    assert "sigma" in right.get_xlabel()
    labels = [t.get_text() for t in right.get_legend().get_texts()]
    assert [label.split(",")[0] for label in labels] == [
        "block 0: layers 1-4",
        "block 1: layers 5-8",
        "block 2: layers 9-12",
    ]
    # Equal mass: the middle block owns 0.18 to 0.51.
    assert labels[1].endswith("0.18-0.51")


def test_pyplot_is_left_alone():
    before = "matplotlib.pyplot" in sys.modules
    figure()
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib.*dblocks\[bench\]"):
        figure()
