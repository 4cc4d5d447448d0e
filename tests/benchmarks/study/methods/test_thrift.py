import pytest
import torch

from benchmarks.study.methods import thrift

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
