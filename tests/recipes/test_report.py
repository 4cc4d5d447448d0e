import pytest

from dblocks.recipes.report import (
    COSTS,
    README_COSTS,
    Column,
    markdown_table,
    percent,
    spread,
    text_table,
    write_between_markers,
)


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


def test_spread_is_mean_and_sample_deviation():
    assert percent(THREE, lambda r: r["accuracy"]) == "97.0 ± 1.0 %"
    assert spread(THREE, lambda r: r["seconds"], ".2f", unit=" s") == "101.00 ± 1.00 s"


def test_one_seed_has_no_deviation():
    assert percent([record()], lambda r: r["accuracy"]) == "90.0 %"


def test_what_a_run_does_not_have_is_a_dash():
    assert percent(THREE, lambda r: r["accuracy"] if r["seconds"] > 100 else None) == "-"
    assert spread(THREE, lambda r: None, ".1f") == "-"


@pytest.mark.parametrize("table", [text_table, markdown_table])
def test_runs_of_two_recipes_are_not_averaged(table):
    with pytest.raises(ValueError, match="'mixed' differ in more than their seed"):
        table({"mixed": [record(0), record(1, steps=5)]}, COSTS)


@pytest.mark.parametrize("table", [text_table, markdown_table])
def test_a_row_needs_a_run(table):
    with pytest.raises(ValueError, match="'empty' has no finished run"):
        table({"empty": []}, COSTS)


def test_text_table_is_aligned():
    text = text_table({"end to end": THREE, "3 blocks": THREE}, (ACCURACY, *COSTS))
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1
    for word in ("accuracy", "layer evaluations", "samples", "activations", "optimizer", "seconds"):
        assert word in text
    assert "97.0 ± 1.0 %" in text
    assert "18,000" in text
    assert lines[-1].split()[-2:] == ["101", "101"]


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
