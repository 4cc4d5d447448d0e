import dataclasses
import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from benchmarks.study.plots import Curve, Measure, comparison_figure, mask_panel
from dblocks.blocks import BlocksConfig
from dblocks.recipes.image_grid import save_png
from dblocks.schedules import MaskSchedule, NoiseSchedule

CURVES = [
    Curve(label="whole", layer_evaluations=[500, 1000], values=[[50, 90], [60, 92]]),
    Curve(label="blocks", layer_evaluations=[500, 1000], values=[[70, 95]]),
]


def figure(curves=CURVES, schedule=NoiseSchedule(), **options):  # noqa: B008, it is frozen
    return comparison_figure(curves, BlocksConfig(3, schedule=schedule), 12, "Digits", **options)


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


def test_a_falling_measure_runs_down_to_its_best():
    measure = Measure(label="bits", title="Bits", form="{:.2f} bits", best=1.0, step=0.5)
    curves = [Curve(label="a", layer_evaluations=[1, 2, 3, 4], values=[[9, 4, 2.6, 2.25]])]
    left, _ = figure(curves, measure=measure).axes
    assert left.get_legend().get_texts()[0].get_text() == "a: 2.25 bits"
    low, high = left.get_ylim()
    assert low == 1.0
    assert 2.6 + 2 * 0.5 <= high < 4.5


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


def test_every_curve_is_drawn_and_looks_different():
    curves = [
        Curve(label=f"{i}", layer_evaluations=[1, 2], values=[[10 * i, 90]]) for i in range(9)
    ]
    made = figure(curves)
    lines = [line for line in made.axes[0].get_lines() if line.get_marker() == "None"]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 9
    assert len(made.legends[0].get_texts()) == 9


@pytest.mark.parametrize("partition", ["equal_mass", "uniform_log", "uniform", (5.0, 0.3)])
@pytest.mark.parametrize("cut", [{}, {"sigma_min": 0.2, "sigma_max": 20.0}])
def test_density_is_that_of_the_draws(partition, cut):
    schedule = NoiseSchedule(partition=partition, **cut)
    _, right = figure(schedule=schedule).axes
    lines = right.get_lines()
    assert len(lines) == 3
    for b, line in enumerate(lines):
        t = torch.tensor(list(line.get_xdata()), dtype=torch.float64).log()
        density = torch.tensor(list(line.get_ydata()), dtype=torch.float64)
        assert torch.trapezoid(density, t).item() == pytest.approx(1 / 3)
        draws = schedule.sample(b, 3, (20_000,), overlap=0).double().log()
        mean = 3 * torch.trapezoid(t * density, t).item()
        assert mean == pytest.approx(draws.mean().item(), abs=0.05)
        assert density.max() < right.get_ylim()[1]


def test_equal_mass_draws_one_truncated_bell():
    """The mass outside the range counts inside: the bell is higher than the normal density."""
    schedule = NoiseSchedule(sigma_min=0.2, sigma_max=20.0)
    _, right = figure(schedule=schedule).axes
    lines = right.get_lines()
    for upper, lower in pairwise(lines):
        assert upper.get_ydata()[0] == pytest.approx(lower.get_ydata()[-1], rel=1e-3)
    mass = schedule._tails(schedule.sigma_min, schedule.sigma_max)[2]
    peak = 1 / (schedule.p_std * math.sqrt(2 * math.pi) * mass)
    assert max(max(line.get_ydata()) for line in lines) == pytest.approx(peak, rel=1e-3)


def test_text_is_legible_at_the_width_of_a_readme():
    drawn = figure()
    readme_inches = 880 / 96
    for text in drawn.findobj(lambda artist: hasattr(artist, "get_fontsize")):
        if text.get_text():
            assert text.get_fontsize() * readme_inches / drawn.get_figwidth() > 8


def test_pyplot_is_left_alone():
    before = "matplotlib.pyplot" in sys.modules
    figure()
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib.*dblocks\[bench\]"):
        figure()


def test_right_panel_of_masks_is_their_ratio_against_time():
    _, right = figure(schedule=MaskSchedule("cosine"), panel=mask_panel).axes
    assert right.get_xlabel() == "time t"
    assert [t.get_text() for t in right.get_legend().get_texts()] == [
        "block 0: layers 1-4, t 0.46-1",
        "block 1: layers 5-8, t 0.22-0.46",
        "block 2: layers 9-12, t 0-0.22",
    ]
    lines = right.get_lines()[:3]
    ends = [(line.get_ydata()[-1], line.get_ydata()[0]) for line in lines]
    assert [y for pair in ends for y in pair] == pytest.approx([1, 2 / 3, 2 / 3, 1 / 3, 1 / 3, 0])


@pytest.mark.parametrize("top_share", [0.6, 1.0])
def test_nothing_of_many_curves_is_cut_off(top_share):
    label = "end to end, 3 times the steps (equal samples), and more"
    curves = [dataclasses.replace(CURVES[1], label=f"{label} {i}") for i in range(9)]
    made = comparison_figure(curves, BlocksConfig(3, top_share=top_share), 12, "Digits")
    assert len(made.axes) == (1 if top_share == 1 else 2)
    FigureCanvasAgg(made).draw()
    (below,) = made.legends
    texts = [
        *below.get_texts(),
        *(ax.title for ax in made.axes),
        *(ax.yaxis.label for ax in made.axes),
    ]
    for text in texts:
        box = text.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= made.bbox.x1
        assert 0 <= box.y0 < box.y1 <= made.bbox.y1
    assert all(ax.get_window_extent().width > 0.3 * made.bbox.x1 for ax in made.axes)
