"""Curves over the budget: points, dashes for what was not run, and sentences."""

import dataclasses

import pytest

from benchmarks.study import budget, vit_study
from benchmarks.study.quality import ACCURACY, BITS
from benchmarks.study.report import finished
from benchmarks.study.report.curves import Line, crossings, curve_block, lines_of
from benchmarks.study.report.figures import budget_figure, budget_picture

MADE = {"seconds": 1.0, "activations_mib": 1.0, "state_mib": 1.0}
TITLES = {"end_to_end": "end to end", "blocks": "3 blocks", "small": "4 layers"}


def page(study, there):
    """A comparison with these records, by row."""
    lines = finished._curve(study.rows, {row.name: there.get(row.name, []) for row in study.rows})
    return finished.Finished(
        name="a-study", titles=TITLES, kinds={}, seeds={}, records={}, missing=[],
        quality=study.quality, columns=(), caption=lambda _: "", draw=None, curve=lines,
    )  # fmt: skip


def record(evaluations, seed=0, **measured):
    return {"run": {"seed": seed}, "layer_evaluations": evaluations, **MADE, **measured}


def test_points_that_were_not_run_are_dashes():
    found = page(
        budget.STUDY,
        {
            "end_to_end": [record(10, bits=3.0)],
            "end_to_end_x2": [record(20, bits=2.5)],
            "small_x4": [record(40, bits=2.4)],
            "blocks": [record(10, bits=2.9, product_bits=2.8)],
            "blocks_x2": [record(20, bits=2.8, product_bits=2.6)],
        },
    )
    lines = curve_block(found).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:7]]
    assert [row[0] for row in cells] == ["layer evaluations", "---", "10", "20", "40"]
    by_title = dict(zip(cells[0], zip(*cells[2:], strict=True), strict=True))
    assert by_title["end to end"] == ("3.000", "2.500", "-")
    assert by_title["4 layers"] == ("-", "-", "2.400")
    assert by_title["3 blocks, the first alone"] == ("2.900", "2.800", "-")
    assert by_title["3 blocks, their product"] == ("2.800", "2.600", "-")
    assert "their product" in budget_picture(found)


@pytest.mark.parametrize("row", ["end_to_end", "end_to_end_x2", "blocks_x4", "small_x0.5"])
def test_a_curve_of_a_single_record_renders(row):
    study = vit_study.FASHION
    found = page(study, {row: [record(10, accuracy=0.5)]})
    assert ("50.0" in curve_block(found)) == ("_x" in row)
    assert lines_of(found) == [] or budget_figure(found).axes


def test_points_are_of_the_seed_of_the_others():
    there = {
        "end_to_end": [record(10, seed=1, bits=1.0), record(10, seed=0, bits=3.0)],
        "end_to_end_x2": [record(20, bits=2.5)],
    }
    (line,) = lines_of(page(budget.STUDY, there))
    assert line.points == {1.0: (10, 3.0), 2.0: (20, 2.5)}


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        ((2.9, 2.4), "better than end to end from 10 to 20 layer evaluations (by 0.100 bits first"),
        ((3.1, 2.5), "not better than end to end from 10 to 20"),
        ((3.1, 2.4), "better than end to end at 20 of 10 to 20 layer evaluations, not at the"),
    ],
)
def test_sentences_follow_the_points(ours, said):
    whole = Line("end_to_end", "end to end", {1.0: (10, 3.0), 2.0: (20, 2.5)})
    other = Line("small", "4 layers", {1.0: (10, ours[0]), 2.0: (20, ours[1])})
    assert said in crossings([whole, other], BITS)[0]
    # Of accuracy more is better.
    turned = [
        line._replace(points={s: (n, -v) for s, (n, v) in line.points.items()})
        for line in (whole, other)
    ]
    assert (
        crossings(turned, dataclasses.replace(ACCURACY, form=".3f", unit=" bits"))[0]
        == (crossings([whole, other], BITS)[0])
    )


def test_one_common_budget_says_nothing():
    whole = Line("end_to_end", "end to end", {1.0: (10, 3.0)})
    assert crossings([whole, Line("small", "4 layers", {1.0: (10, 2.0)})], BITS) == []
    assert crossings([Line("small", "4 layers", {1.0: (10, 2.0)})], BITS) == []
