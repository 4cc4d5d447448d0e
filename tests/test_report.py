import math

import pytest

from dblocks.report import markdown_table, summarize, text_table, write_between_markers


def record(seed=0, accuracy=0.9, first_block=None, **run):
    return {
        "run": {"seed": seed, "lr": 1e-3, **run},
        "adaln": True,
        "accuracy": accuracy,
        "accuracy_by_denoising_steps": first_block and {"1": first_block, "3": accuracy},
        "layers_per_step": 4,
        "layer_evaluations": 18_000,
        "samples": 576_000,
        "activations_mib": 44.26,
        "state_mib": 5.04,
        "process_mib": 6.0,
        "seconds": 100.0 + seed,
    }


THREE = [record(0, 0.96), record(1, 0.97), record(2, 0.98)]


def test_summary_is_mean_and_sample_deviation():
    row = summarize("3 blocks", THREE)
    assert row.accuracy == pytest.approx(0.97)
    assert row.accuracy_std == pytest.approx(0.01)
    assert row.seconds == 101
    assert row.num_seeds == 3


def test_one_seed_has_no_deviation():
    row = summarize("3 blocks", [record()])
    assert math.isnan(row.accuracy_std)
    assert "90.0 %" in text_table([row])
    assert "±" not in text_table([row])


def test_the_first_block_alone_stands_beside_all_blocks():
    blocks = summarize("3 blocks", [record(0, 0.96, 0.94), record(1, 0.97, 0.96)])
    assert blocks.first_block == pytest.approx(0.95)
    text = text_table([summarize("end to end", THREE), blocks])
    line = next(line for line in text.splitlines() if "1 denoising step" in line)
    assert line.split()[-5:] == ["-", "95.0", "±", "1.4", "%"]


def test_runs_of_two_recipes_are_not_averaged():
    with pytest.raises(ValueError, match="differ in more than their seed"):
        summarize("mixed", [record(0), record(1, steps=5)])


def test_a_row_needs_a_run():
    with pytest.raises(ValueError, match="'empty' has no finished run"):
        summarize("empty", [])


def test_text_table_is_aligned():
    text = text_table([summarize("end to end", THREE), summarize("3 blocks", THREE)])
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1
    for word in ("accuracy", "layer evaluations", "samples", "activations", "optimizer", "seconds"):
        assert word in text
    assert "97.0 ± 1.0 %" in text
    assert "18,000" in text


def test_markdown_table_has_one_cell_a_column():
    lines = markdown_table([summarize("3 blocks", THREE)]).splitlines()
    assert len(lines) == 3
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| 3 blocks | yes | 0.001 | 97.0 ± 1.0 % | 18,000 (4 a step) |")


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
