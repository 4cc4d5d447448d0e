"""What the report writes into the pages, and memory beside its plan."""

import pytest

from benchmarks.study.__main__ import STUDIES, comparison
from benchmarks.study.layers import SPLITS
from benchmarks.study.pages import WIDEST, seeds_of, text_tables
from benchmarks.study.report.markdown import study_block, table
from benchmarks.study.report.planned import compared
from dblocks.recipes.tables import Column

PLANNED = {
    "vit-fashion": ("end_to_end", "small", "blocks", "published"),
    "dit-digits": ("end_to_end", "blocks_3"),
    "causal-lm-pydoc": ("end_to_end", "blocks"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANNED)
def test_memory_as_counted_is_within_5_percent_of_the_plan(name):
    found = comparison(name)
    kept = {row: found.records[row] for row in PLANNED[name]}
    object.__setattr__(found, "records", kept)
    rows = compared(found)
    assert len(rows) == len(PLANNED[name])
    for row in rows:
        assert row.ratios == pytest.approx((1, 1), abs=0.05), row


def test_wide_tables_are_refused_or_split():
    with pytest.raises(ValueError, match="at most 8 columns, got 9"):
        table([str(i) for i in range(9)], [])
    rows = {f"row {i}": [{"run": {"seed": 0}, "x": i}] for i in range(9)}
    parts = text_tables(rows, [Column("x", lambda r: str(r[0]["x"]))])
    assert [part.splitlines()[-1].split() for part in parts] == [
        ["x", "0", "1", "2", "3", "4"], ["x", "5", "6", "7", "8"],
    ]  # fmt: skip
    assert all(len(part.splitlines()[-1].split()) <= WIDEST for part in parts)


def test_a_measure_that_no_row_has_is_left_out_with_its_reason():
    column = Column("x", lambda r: r[0]["x"], "Why it is missing.")
    rows = {"a": [{"run": {"seed": 0}, "x": "-"}]}
    assert text_tables(rows, [column])[0].count("x") == 0
    rows["b"] = [{"run": {"seed": 0}, "x": "1"}]
    assert text_tables(rows, [column])[0].splitlines()[-1].split() == ["x", "-", "1"]


def test_seeds_are_told_where_rows_have_fewer():
    def runs(*seeds):
        return [{"run": {"seed": seed}} for seed in seeds]

    assert seeds_of({"a": runs(0, 1), "b": runs(1, 0)}) == "0, 1"
    assert seeds_of({"a": runs(0), "b": runs(0, 1, 2)}) == "0, 1, 2 (a: 0)"


def test_rows_that_are_not_run_stand_with_their_command():
    text = study_block(comparison("causal-lm-layers"))
    for row in STUDIES["causal-lm-layers"].rows:
        assert row.title in text
        assert f"study causal-lm-layers --rows {row.name}`" in text


def test_blocks_of_unequal_layers_are_cut_so():
    rows = {row.name: row.run for row in STUDIES["vit-fashion"].rows}
    text = {row.name: row.run for row in STUDIES["causal-lm-layers"].rows}
    for layers in SPLITS:
        name = f"blocks_{''.join(map(str, layers))}"
        assert rows[name].blocks_config().layers_per_block == layers
        assert text[name].blocks_config(3).layers_per_block == layers
        assert type(text[name]).from_dict(text[name].to_dict()) == text[name]
