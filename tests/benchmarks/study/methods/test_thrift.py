import dataclasses
from functools import partial

import pytest
import torch

from benchmarks.study import costing
from benchmarks.study.__main__ import STUDIES
from benchmarks.study.archive import Archive
from benchmarks.study.costing import run_costs
from benchmarks.study.methods import thrift
from benchmarks.study.rows import Row

from .conftest import OTHERS, trainer_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("name", "technique"),
    [
        ("end_to_end", "checkpointing"),
        ("end_to_end", "offload"),
        ("blocks", "checkpointing"),
        ("blocks", "residency"),
        ("published", "checkpointing"),
        ("published", "residency"),
    ],
)
def test_training_is_bit_for_bit_that_without(name, technique):
    plain, spared = trainer_of(OTHERS[name]), trainer_of(OTHERS[name])
    around = thrift.apply(spared, technique)
    for step in range(6):
        expected = plain.step(step)
        with around():
            assert spared.step(step) == expected
    pairs = zip(plain.trained.parameters(), spared.trained.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    gradients = []
    for trainer in (plain, spared):
        with around():
            trainer.loss(trainer.batch(0), 0).backward()
        gradients.append([p.grad for p in trainer.trained.parameters() if p.grad is not None])
    assert all(map(torch.equal, *gradients))
    without, found = (
        thrift.bytes_of(plain, plain, "none"),
        thrift.bytes_of(plain, spared, technique),
    )
    assert found["device_mib"] < without["device_mib"]
    if technique == "residency":
        assert found["activations_mib"] == without["activations_mib"]
    else:
        assert found["activations_mib"] < without["activations_mib"] / 2
        assert found["state_mib"] == without["state_mib"]


def test_residency_needs_blocks():
    with pytest.raises(ValueError, match="residency needs a network in blocks"):
        thrift.apply(trainer_of(OTHERS["end_to_end"]), "residency")


def test_costs_are_measured_once_and_kept(tmp_path, monkeypatch):
    rows = [
        Row(name=name, title=name, method="", run=dataclasses.replace(OTHERS[name], data="digits"))
        for name in ("end_to_end", "blocks")
    ]
    study = dataclasses.replace(STUDIES["vit-digits"], rows=rows)
    monkeypatch.setattr(costing, "measure", partial(thrift.measure, steps=1))
    found = run_costs(study, tmp_path / "records")
    titles = {"end_to_end", "end_to_end, checkpointing", "end_to_end, offload"}
    titles |= {"blocks", "blocks, checkpointing", "blocks, residency"}
    assert set(found) == titles
    assert len(Archive(tmp_path / "records").load()) == 6
    monkeypatch.setattr(costing, "measure", None)
    assert run_costs(study, tmp_path / "records") == found
    offload, plain = found["end_to_end, offload"][0], found["end_to_end"][0]
    assert offload["host_mib"] >= plain["activations_mib"] > 0 == offload["activations_mib"]
