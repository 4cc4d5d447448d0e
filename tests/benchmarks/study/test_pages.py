import pytest

from benchmarks.study.pages import README_COSTS, markdown_table, write_between_markers
from dblocks.recipes.tables import Column, percent


def record(seed=0, accuracy=0.9, **run):
    return {
        "run": {"seed": seed, "lr": 1e-3, **run},
        "accuracy": accuracy,
        "layers_per_step": 4,
        "layer_evaluations": 18_000,
        "samples": 576_000,
        "activations_mib": 44.26,
        "state_mib": 5.04,
        "process_mib": 6.0,
        "seconds": 100.0 + seed,
    }


THREE = [record(0, 0.96), record(1, 0.97), record(2, 0.98)]
ACCURACY = Column("accuracy", lambda records: percent(records, lambda r: r["accuracy"]))


def test_runs_of_two_recipes_are_not_averaged():
    with pytest.raises(ValueError, match="'mixed' differ in more than their seed"):
        markdown_table({"mixed": [record(0), record(1, steps=5)]}, README_COSTS)


def test_a_row_needs_a_run():
    with pytest.raises(ValueError, match="'empty' has no finished run"):
        markdown_table({"empty": []}, README_COSTS)


def test_markdown_table_has_one_cell_a_column():
    lines = markdown_table({"3 blocks": THREE}, (ACCURACY, *README_COSTS)).splitlines()
    assert len(lines) == 3
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| 3 blocks | 97.0 ± 1.0 % | 18,000 (4 a step) | 576,000 | 44.3 |")


def test_text_goes_between_the_markers(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- a:b -->\nold\n<!-- /a:b -->\nafter\n")
    for _ in range(2):
        write_between_markers(path, "a:b", "new\n")
        assert path.read_text() == "before\n<!-- a:b -->\nnew\n<!-- /a:b -->\nafter\n"


@pytest.mark.parametrize(
    "text", [None, "", "<!-- a:b -->", "<!-- /a:b --><!-- a:b -->", "<!-- a:b -->" * 2]
)
def test_missing_markers_are_a_clear_error(tmp_path, text):
    path = tmp_path / "README.md"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"must hold the lines <!-- a:b --> and <!-- /a:b -->"):
        write_between_markers(path, "a:b", "new")
    assert path.exists() == (text is not None)
