"""A checkpoint is whole or refused by name, and gives back every bit of what it was made of."""

import errno
import os
import random

import pytest
import torch
from torch import nn

from dblocks.scale import Checkpoints
from dblocks.scale.state import pack, unpack

CONFIGURATION = {"run": {"lr": 0.1, "sizes": (1, 2)}, "blocks": 3}
FILES = ("generator.safetensors", "model.safetensors", "optimizer.safetensors", "state.json")


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2),
}


class Training:
    """A small model with all that a training holds."""

    def __init__(self, make=lambda p: torch.optim.AdamW(p, lr=1e-2), dtype=torch.float32):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).to(dtype)
        self.ema = torch.optim.swa_utils.AveragedModel(self.model)
        self.optimizer = make(list(self.model.parameters()))
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=9)
        self.scaler = torch.amp.GradScaler("cpu")
        self.generator = torch.Generator().manual_seed(5)

    def objects(self):
        names = ("model", "ema", "optimizer", "scheduler", "scaler", "generator")
        return {name: getattr(self, name) for name in names}

    def step(self):
        dtype = self.model[0].weight.dtype
        x = torch.randn(6, 3, generator=self.generator).to(dtype)

        def closure():
            self.optimizer.zero_grad()
            loss = self.model(x).square().mean()
            loss.backward()
            return loss

        loss = self.optimizer.step(closure)
        self.scheduler.step()
        self.ema.update_parameters(self.model)
        return loss.item()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_what_is_resumed_goes_on_bit_for_bit(tmp_path, make):
    first = Training(make)
    for _ in range(3):
        first.step()
    Checkpoints(tmp_path, CONFIGURATION).save(3, first.objects())
    expected = [first.step() for _ in range(3)]
    second = Training(make)
    assert Checkpoints(tmp_path, CONFIGURATION).resume(second.objects()) == 3
    assert [second.step() for _ in range(3)] == expected
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(first.ema.parameters(), second.ema.parameters(), strict=True):
        assert torch.equal(a, b)


def test_moments_keep_their_dtype(tmp_path):
    """load_state_dict alone rounds float32 moments to the bfloat16 of their parameter."""
    first, second = Training(dtype=torch.bfloat16), Training(dtype=torch.bfloat16)
    first.step()
    for held in first.optimizer.state.values():
        held["exp_avg"] = torch.randn_like(held["exp_avg"], dtype=torch.float32)
    Checkpoints(tmp_path, {}).save(1, first.objects())
    Checkpoints(tmp_path, {}).resume(second.objects())
    held = zip(first.optimizer.state.values(), second.optimizer.state.values(), strict=True)
    for a, b in held:
        assert b["exp_avg"].dtype == torch.float32
        assert torch.equal(a["exp_avg"], b["exp_avg"])


def test_states_are_values_and_tensors_only():
    state = {"a": [1, 2.5, None, True, float("inf"), 2**64], 3: (), "t": torch.arange(3)}
    state |= {"nested": {"t": torch.zeros(()), (1, "b"): "text"}}
    tensors = {}
    found = unpack(pack(state, tensors), tensors)
    assert torch.equal(found.pop("t"), state.pop("t"))
    assert torch.equal(found["nested"].pop("t"), state["nested"].pop("t"))
    assert found == state
    assert isinstance(found[3], tuple)
    with pytest.raises(TypeError, match=r"numbers, texts and tensors, got function at a\.0"):
        pack({"a": [lambda: 0]}, {})
    with pytest.raises(ValueError, match="must have been written by a checkpoint"):
        unpack({"tensor": "absent", "device": "cpu"}, {})


def test_what_has_no_state_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"must be a torch\.Generator or have state_dict"):
        Checkpoints(tmp_path, {}).save(1, {"model": 5})
    with pytest.raises(ValueError, match="the name of an object"):
        Checkpoints(tmp_path, {}).save(1, {"../model": nn.Linear(1, 1)})
    with pytest.raises(ValueError, match="keep must be a positive integer"):
        Checkpoints(tmp_path, {}, keep=0)
    assert list(tmp_path.iterdir()) == []


def test_the_last_ones_stay(tmp_path):
    training, kept = Training(), Checkpoints(tmp_path, {}, keep=2)
    for step in range(1, 5):
        kept.save(step, training.objects())
    assert [path.name for path in kept.found()] == ["step-00000004", "step-00000003"]
    assert Checkpoints(tmp_path / "none", {}).resume(training.objects()) is None
    kept.clear()
    assert list(tmp_path.iterdir()) == [tmp_path / "none"]


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 1 and 2, and the newer one's folder."""
    training = Training()
    objects = {k: v for k, v in training.objects().items() if f"{k}.safetensors" in FILES}
    kept = Checkpoints(tmp_path, CONFIGURATION)
    for step in (1, 2):
        training.step()
        kept.save(step, objects)
    return objects, tmp_path / "step-00000002"


def refused(objects, newest, name):
    """Resumes from the older checkpoint; the message names the file of the newest."""
    kept = Checkpoints(newest.parent, CONFIGURATION)
    with pytest.warns(UserWarning, match=r"step-00000002 is refused: ") as caught:
        assert kept.resume(objects) == 1
    said = str(caught[0].message)
    assert name in said or "checksums.txt" in name
    return kept


@pytest.mark.parametrize("name", [*FILES, "checksums.txt"])
@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "longer"])
def test_a_broken_file_is_named_and_the_checkpoint_before_is_used(saved, name, how):
    objects, newest = saved
    contents = (newest / name).read_bytes()
    (newest / name).unlink()
    cut = {"truncated": contents[: len(contents) // 2], "empty": b"", "longer": contents + b"\n"}
    if how != "missing":
        (newest / name).write_bytes(cut[how])
    kept = refused(objects, newest, name)
    # The next one takes the place of the broken one, not of the good one.
    kept.save(2, objects)
    assert [path.name for path in kept.found()] == ["step-00000002", "step-00000001"]
    assert Checkpoints(newest.parent, CONFIGURATION).resume(objects) == 2


def test_checksums_without_a_line_are_refused(saved):
    objects, newest = saved
    lines = (newest / "checksums.txt").read_text().splitlines(keepends=True)
    for keep in range(len(lines)):
        (newest / "checksums.txt").write_text("".join(lines[:keep]))
        refused(objects, newest, "checksums.txt")


@pytest.mark.parametrize("flips", [20, pytest.param(200, marks=pytest.mark.long)])
def test_a_flipped_bit_is_found_wherever_it_is(saved, flips):
    objects, newest = saved
    chosen = random.Random(0)
    for i in range(flips):
        name = [*FILES, "checksums.txt"][i % 5]
        contents = bytearray((newest / name).read_bytes())
        before = bytes(contents)
        contents[chosen.randrange(len(contents))] ^= 1 << chosen.randrange(8)
        (newest / name).write_bytes(contents)
        refused(objects, newest, name)
        (newest / name).write_bytes(before)
    assert Checkpoints(newest.parent, CONFIGURATION).resume(objects) == 2


def test_where_all_are_broken_nothing_starts_silently(saved):
    objects, newest = saved
    for path in newest.parent.glob("*/model.safetensors"):
        path.write_bytes(b"")
    kept = Checkpoints(newest.parent, CONFIGURATION)
    with (
        pytest.warns(UserWarning, match="model.safetensors is not what was written"),
        pytest.raises(ValueError, match="must hold a valid checkpoint, got 2 damaged"),
    ):
        kept.resume(objects)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_refused_one_does_not_count_among_the_kept(saved, keep):
    objects, newest = saved
    (newest / "state.json").unlink()
    kept = Checkpoints(newest.parent, CONFIGURATION, keep=keep)
    with pytest.warns(UserWarning, match=r"state\.json is missing"):
        kept.resume(objects)
    kept.save(3, objects)
    expected = ["step-00000003", "step-00000001"][:keep]
    assert [path.name for path in kept.found()] == expected


def test_another_configuration_is_refused_by_name(saved):
    objects, newest = saved
    other = {"run": {"lr": 0.2, "sizes": [1, 2]}, "blocks": 3, "data": "b"}
    before = [p.clone() for p in objects["model"].parameters()]
    with pytest.raises(
        ValueError,
        match=r"step-00000002 has another configuration: data was None and is 'b', "
        r"run\.lr was 0\.1 and is 0\.2; resume with",
    ):
        Checkpoints(newest.parent, other).resume(objects)
    for p, was in zip(objects["model"].parameters(), before, strict=True):
        assert torch.equal(p, was)
    with pytest.raises(ValueError, match=r"must hold \['model'\], got \['generator', 'model'"):
        Checkpoints(newest.parent, CONFIGURATION).resume({"model": objects["model"]})
    wide = nn.Sequential(nn.Linear(3, 4).double())
    with pytest.raises(ValueError, match=r"cannot be used: 0\.weight must have dtype"):
        Checkpoints(newest.parent, CONFIGURATION).resume({**objects, "model": wide})


@pytest.mark.parametrize(
    ("call", "error"), [("fsync", errno.ENOSPC), ("rename", errno.EACCES), ("mkdir", errno.EROFS)]
)
def test_what_cannot_be_written_keeps_the_earlier_ones(saved, monkeypatch, call, error):
    objects, newest = saved
    kept = Checkpoints(newest.parent, CONFIGURATION)

    def fail(*args, **kwargs):
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(OSError, match=f"step-00000003 cannot be written: .*{error}"):
            kept.save(3, objects)
    assert sorted(p.name for p in newest.parent.iterdir()) == ["step-00000001", "step-00000002"]
    assert kept.resume(objects) == 2


@pytest.mark.parametrize(
    ("call", "count", "step"),
    [("fsync", 1, 2), ("fsync", 4, 2), ("rename", 1, 2), ("rename", 2, 3), ("rename", 3, 3)],
)
def test_a_process_that_dies_leaves_valid_checkpoints(saved, call, count, step):
    objects, newest = saved
    process = os.fork()
    if process == 0:
        try:
            original, seen = getattr(os, call), [0]

            def die(*args, **kwargs):
                seen[0] += 1
                return os._exit(9) if seen[0] == count else original(*args, **kwargs)

            setattr(os, call, die)
            Checkpoints(newest.parent, CONFIGURATION, keep=1).save(3, objects)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    kept = Checkpoints(newest.parent, CONFIGURATION, keep=1)
    assert kept.resume(objects) == step
    kept.save(4, objects)
    assert [path.name for path in newest.parent.iterdir()] == ["step-00000004"]


def test_nothing_is_unpickled(saved, monkeypatch):
    objects, newest = saved
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr("pickle.load", None)
    monkeypatch.setattr("pickle.loads", None)
    assert Checkpoints(newest.parent, CONFIGURATION).resume(objects) == 2
    assert {path.suffix for path in newest.iterdir()} == {".json", ".txt", ".safetensors"}


def test_tensors_that_share_memory_are_each_written(tmp_path):
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    Checkpoints(tmp_path, {}).save(1, {"model": tied})
    expected = tied[0].weight.detach().clone()
    nn.init.zeros_(tied[0].weight)
    Checkpoints(tmp_path, {}).resume({"model": tied})
    assert torch.equal(tied[1].weight, expected)
    assert tied[0].weight is tied[1].weight


def test_the_checksums_are_those_of_sha256sum(saved):
    import hashlib

    _, newest = saved
    head, *lines = (newest / "checksums.txt").read_text().splitlines()
    assert head == f"# sha256 of {len(FILES)} files"
    for line, name in zip(lines, FILES, strict=True):
        assert line == f"{hashlib.sha256((newest / name).read_bytes()).hexdigest()}  {name}"


def test_a_run_that_starts_anew_beside_an_older_one_is_refused(tmp_path):
    generator = {"generator": torch.Generator()}
    older = Checkpoints(tmp_path, {})
    older.save(20, generator)
    with pytest.raises(ValueError, match=r"no later checkpoint than step 10, got step-00000020"):
        Checkpoints(tmp_path, {}).save(10, generator)
    older.clear()
    Checkpoints(tmp_path, {}).save(10, generator)


@pytest.mark.parametrize("step", [1.5, "x", True])
def test_a_step_is_an_integer(tmp_path, step):
    with pytest.raises(TypeError, match="step must be an integer, got"):
        Checkpoints(tmp_path, {}).save(step, {"generator": torch.Generator()})


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        (
            {"lr": 0.1, "seed": torch.ones(2)},
            r"configuration\['seed'\] .* got Tensor: .*; write it",
        ),
        (
            {"run": {"tags": {"a", "b"}}},
            r"configuration\['run'\] must be a JSON value .* of type set",
        ),
        ({"path": object}, r"configuration\['path'\]"),
        ({("a", 1): 2}, r"configuration\[\('a', 1\)\]"),
        ([("lr", 1)], "configuration must be a mapping of names to JSON values, got list"),
    ],
)
def test_a_configuration_that_is_no_json_is_named(tmp_path, configuration, message):
    with pytest.raises(TypeError, match=message):
        Checkpoints(tmp_path / "none", configuration)
    assert not (tmp_path / "none").exists()
