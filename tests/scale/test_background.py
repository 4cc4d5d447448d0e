"""Checkpoints that a thread writes while training goes on."""

import threading

import pytest
import torch

from dblocks.scale import Checkpoints, checkpoints


@pytest.fixture
def gate(monkeypatch):
    """Writing waits until this is set, and fails where `gate.error` says so."""
    opened, save = threading.Event(), checkpoints.save_safetensors
    opened.error = None

    def slow(path, tensors):
        assert opened.wait(30)
        if opened.error is not None:
            raise opened.error
        save(path, tensors)

    monkeypatch.setattr(checkpoints, "save_safetensors", slow)
    yield opened
    opened.set()


def made(folder):
    return Checkpoints(folder, {"a": 1}, background=True)


def test_what_is_written_is_the_state_at_the_call(tmp_path, gate):
    model = torch.nn.Linear(2, 2)
    generator = torch.Generator().manual_seed(1)
    objects = {"model": model, "generator": generator}
    kept, numbers = made(tmp_path), generator.get_state()
    wanted = {name: p.clone() for name, p in model.state_dict().items()}
    kept.save(1, objects)
    assert kept.found() == []
    with torch.no_grad():
        model.weight.add_(1)
    torch.rand(3, generator=generator)
    gate.set()
    kept.wait()
    assert kept.last == 1
    assert made(tmp_path).resume(objects) == 1
    assert all(torch.equal(p, wanted[name]) for name, p in model.state_dict().items())
    assert torch.equal(generator.get_state(), numbers)


def test_the_next_save_waits_and_a_failure_is_told_by_its_step(tmp_path, gate):
    objects = {"model": torch.nn.Linear(2, 2)}
    kept = made(tmp_path)
    gate.set()
    kept.save(1, objects)
    kept.save(2, objects)
    assert [path.name for path in kept.found()][-1] == "step-00000001"
    kept.wait()
    gate.error = OSError(28, "No space left on device")
    kept.save(3, objects)
    with pytest.raises(OSError, match=r"of step 3 was not written: .*No space left"):
        kept.save(4, objects)
    gate.error = None
    kept.save(4, objects)  # the one before is no more asked for
    kept.wait()
    assert [path.name[-1] for path in kept.found()] == ["4", "2"]
    gate.error = PermissionError(13, "Permission denied")
    kept.save(5, objects)
    with pytest.raises(OSError, match="the checkpoint of step 5 was not written"):
        kept.wait()
    kept.wait()
    assert kept.last == 4


def test_the_end_of_a_block_waits(tmp_path, gate):
    objects = {"model": torch.nn.Linear(2, 2)}
    gate.set()
    with made(tmp_path) as kept:
        kept.save(1, objects)
    assert kept.last == 1
    gate.error = OSError(28, "No space left on device")
    with pytest.raises(OSError, match="of step 2"), made(tmp_path / "a") as kept:
        kept.save(2, objects)


def test_a_failure_to_write_does_not_hide_what_ended_training(tmp_path, gate):
    gate.set()
    gate.error = OSError(28, "No space left on device")

    def train():
        with made(tmp_path) as kept:
            kept.save(2, {"model": torch.nn.Linear(2, 2)})
            raise KeyError("stop")

    with (
        pytest.warns(UserWarning, match="of step 2 was not written"),
        pytest.raises(KeyError, match="stop"),
    ):
        train()
