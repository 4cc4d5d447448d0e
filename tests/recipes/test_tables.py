import pytest

from dblocks.recipes.tables import COSTS, Column, difference, percent, spread, text_table


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


def test_spread_is_mean_and_sample_standard_deviation():
    assert percent(THREE, lambda r: r["accuracy"]) == "97.0 ± 1.0 %"
    assert spread(THREE, lambda r: r["seconds"], ".2f", unit=" s") == "101.00 ± 1.00 s"


def test_one_seed_has_no_standard_deviation():
    assert percent([record()], lambda r: r["accuracy"]) == "90.0 %"


def test_what_a_run_does_not_have_is_a_dash():
    assert percent(THREE, lambda r: r["accuracy"] if r["seconds"] > 100 else None) == "-"
    assert spread(THREE, lambda r: None, ".1f") == "-"


def test_a_difference_is_paired_by_seed():
    others = [record(seed, 0.9 + 0.01 * seed) for seed in (2, 1, 0, 5)]

    def percents(r):
        return 100 * r["accuracy"]

    assert difference(THREE, others, percents, ".1f", unit=" %") == "+6.0 [+6.0, +6.0] %"
    others[2] = record(0, 0.94)  # 2, 6 and 6 points: 4.67 ± 4.303 * 2.309 / sqrt(3)
    assert difference(THREE, others, percents, ".1f") == "+4.7 [-1.1, +10.4]"
    assert difference(others, THREE, percents, ".1f") == "-4.7 [-10.4, +1.1]"
    assert difference(THREE[:1], others, percents, ".1f") == "+2.0"
    assert difference(THREE[:1], others[:1], percents, ".1f") == "-"
    assert difference(THREE, others, lambda r: None, ".1f") == "-"


def test_runs_of_two_recipes_are_not_averaged():
    with pytest.raises(ValueError, match="'mixed' differ in more than their seed"):
        text_table({"mixed": [record(0), record(1, steps=5)]}, COSTS)


def test_a_row_needs_a_run():
    with pytest.raises(ValueError, match="'empty' has no finished run"):
        text_table({"empty": []}, COSTS)


def test_text_table_is_aligned():
    text = text_table({"end to end": THREE, "3 blocks": THREE}, (ACCURACY, *COSTS))
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1
    for word in ("accuracy", "layer evaluations", "samples", "activations", "optimizer", "seconds"):
        assert word in text
    assert "97.0 ± 1.0 %" in text
    assert "18,000" in text
    assert lines[-1].split()[-2:] == ["101", "101"]
