"""What the report writes into the pages, and memory beside its plan."""

import dataclasses

import pytest

from benchmarks.study.__main__ import STUDIES, comparison
from benchmarks.study.layers import SPLITS
from benchmarks.study.pages import WIDEST, seeds_of, table, text_tables
from benchmarks.study.report.finished import Missing, finished_study
from benchmarks.study.report.markdown import not_run
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


def test_rows_that_are_not_run_stand_in_a_line_with_the_command_that_runs_them(tmp_path):
    planned, other = (
        dataclasses.replace(row, name=f"{row.name}{kind}", planned=kind == "")
        for row, kind in ((STUDIES["causal-lm-layers"].rows[0], ""),
                          (STUDIES["causal-lm-layers"].rows[0], "_other"))
    )  # fmt: skip
    third = dataclasses.replace(planned, name="third", title="Third", part="alone", planned=False)
    study = dataclasses.replace(
        STUDIES["causal-lm-layers"], name="none", rows=[planned, other, third]
    )
    lines = not_run(finished_study(study).missing).splitlines()[2:]
    start = "`python -m benchmarks.study study none"
    assert [line.rsplit(" | ", 1)[1] for line in lines] == [
        f"{start} --part methods` |",
        f"{start} --rows {other.name}` |",
        f"{start} --part alone --all` |",
    ]
    # 3 rates and 3 seeds each.
    assert lines[2].startswith("| alone: Third | 6 |")


def test_a_line_tells_new_rows_from_seeds_and_a_sum_of_unknown_hours_is_unknown():
    new, begun = (Missing(title, begun, 3, 0.5, "run") for title, begun in (("a", 0), ("b", 1)))
    assert not_run([new, begun]).splitlines()[2] == "| a; more seeds of 1 row | 6 | 1.0 | `run` |"
    unknown = dataclasses.replace(new, hours=None)
    assert "| a; a | 6 | - |" in not_run([new, unknown])


def test_blocks_of_unequal_layers_are_cut_so():
    rows = {row.name: row.run for row in STUDIES["vit-fashion"].rows}
    text = {row.name: row.run for row in STUDIES["causal-lm-layers"].rows}
    for layers in SPLITS:
        name = f"blocks_{''.join(map(str, layers))}"
        assert rows[name].blocks_config().layers_per_block == layers
        assert text[name].blocks_config(3).layers_per_block == layers
        assert type(text[name]).from_dict(text[name].to_dict()) == text[name]
