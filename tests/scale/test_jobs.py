"""Runs that are interrupted, one job a block, and their merge: all bits are those of one run."""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from dblocks.__main__ import main
from dblocks.blocks import Block
from dblocks.checkpoint import load_model, load_safetensors
from dblocks.recipes.command import Recipe
from dblocks.recipes.trainer import Trainer
from dblocks.recipes.vit import ViTRun
from dblocks.scale import merge_blocks

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 60
SIZES = ("--batch-size", "8", "--width", "12", "--depth", "3", "--heads", "2", "--points", "2")
VIT = ("train", "vit", "--steps", str(STEPS), *SIZES)
EVERY = ("--checkpoint-every", "5", "--resume")


def train(out, *flags, command=VIT):
    assert main([*command, "--out", str(out), *flags]) == 0


def mistake(capsys, *argv):
    assert main(list(map(str, argv))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C raises, also where whoever started the tests has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def forked(out, *flags, seconds=0.0):
    """The same in a process of its own, which takes its time for a step; and where it writes.

    A file `{out}.step` says that training is under way: a signal that comes while Python still
    forks is lost or ends the child where no command runs yet.
    """
    process = os.fork()
    if process:
        return process
    code = 9
    try:
        with open(f"{out}.err", "w") as error:
            sys.stdout = sys.stderr = error
            step = Trainer.step

            def slow(self, number):
                Path(f"{out}.step").touch()
                time.sleep(seconds)
                return step(self, number)

            Trainer.step = slow
            code = main([*VIT, "--out", str(out), *flags])
    finally:
        os._exit(code)


def ended(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def steps_kept(folder):
    return sorted(int(path.name[5:]) for path in folder.glob("checkpoints/step-*"))


def wait_until(true):
    until = time.monotonic() + 60
    while not true():
        assert time.monotonic() < until
        time.sleep(0.002)


def wait_for(folder, step):
    wait_until(lambda: any(kept >= step for kept in steps_kept(folder)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All blocks in one run without interruption, each with its own of what blocks share."""
    out = tmp_path_factory.mktemp("whole")
    train(out, "--shared", "private")
    return out


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Each block by a job of its own, one after the other."""
    out = tmp_path_factory.mktemp("jobs")
    for block in (2, 0, 1):
        train(out, "--block", str(block))
    return out


def same_weights(a, b):
    return (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def test_blocks_trained_alone_are_those_of_one_run(tmp_path, capsys, whole, jobs):
    assert main(["merge", str(tmp_path), str(jobs)]) == 0
    saved = f"Saved model.safetensors, config.json and run.json in {tmp_path}"
    assert saved in capsys.readouterr().out
    assert same_weights(tmp_path, whole)
    assert main(["eval", "vit", "--data", "digits", "--checkpoint", str(tmp_path)]) == 0
    accuracy = json.loads((whole / "run.json").read_text())["accuracy"]
    assert f"held-out accuracy {100 * accuracy:.1f} %" in capsys.readouterr().out
    merged = json.loads((tmp_path / "run.json").read_text())["merged"]
    assert [part["run"]["block"] for part in merged] == [0, 1, 2]
    parts = [json.loads((jobs / f"block-{b}/run.json").read_text()) for b in range(3)]
    assert sum(part["steps_of_block"] for part in parts) == STEPS


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.long)])
def test_a_job_that_is_killed_leaves_the_others_and_loses_nothing(tmp_path, whole, jobs, kills):
    shutil.copytree(jobs, tmp_path / "jobs")
    own, chosen = tmp_path / "jobs" / "block-1", random.Random(kills)
    shutil.rmtree(own)
    others = {p: p.read_bytes() for p in tmp_path.rglob("block-[02]/*") if p.is_file()}
    for kill in range(kills):
        job = forked(tmp_path / "jobs", "--block", "1", *EVERY, seconds=0.004)
        # At a random moment, of saving too, so long as there is some of the way left.
        wait_for(own, 5 + (STEPS - 15) * kill // kills)
        time.sleep(chosen.uniform(0, 0.03))
        os.kill(job, signal.SIGKILL)
        assert ended(job) == -signal.SIGKILL
        assert not (own / "block.json").exists()
    train(tmp_path / "jobs", "--block", "1", *EVERY)
    assert all(path.read_bytes() == contents for path, contents in others.items())
    points = [json.loads(line) for line in (own / "log.jsonl").read_text().splitlines()]
    assert points == json.loads((own / "run.json").read_text())["curve"]
    assert main(["merge", str(tmp_path / "merged"), str(tmp_path / "jobs")]) == 0
    assert same_weights(tmp_path / "merged", whole)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"]
)
def test_a_signal_leaves_a_checkpoint_and_one_line(tmp_path, whole, number, code):
    out = tmp_path / "run"
    job = forked(out, "--shared", "private", "--checkpoint-every", "10", seconds=0.004)
    wait_for(out, 10)
    os.kill(job, number)
    assert ended(job) == code
    last = steps_kept(out)[-1]
    how = f"--resume continues after step {last}"
    line = f"dblocks: interrupted after step {last} of {STEPS}; {how}"
    assert (tmp_path / "run.err").read_text() == f"{line}\n"
    assert not (out / "model.safetensors").exists()
    train(out, "--shared", "private", "--resume")
    assert same_weights(out, whole)
    records = [json.loads((folder / "run.json").read_text()) for folder in (out, whole)]
    for record in records:
        del record["seconds"], record["environment"]
    assert records[0] == records[1]


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [(signal.SIGTERM, 143, "interrupted by SIGTERM"), (signal.SIGINT, 130, "interrupted")],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_without_checkpoints_a_signal_leaves_one_line_and_no_file(tmp_path, number, code, line):
    job = forked(tmp_path / "run", seconds=0.05)
    wait_until((tmp_path / "run.step").exists)
    os.kill(job, number)
    assert ended(job) == code
    assert (tmp_path / "run.err").read_text() == f"dblocks: {line}\n"
    assert not list(tmp_path.glob("run/*"))


class Halted(Exception):
    pass


OTHERS = {
    "shared": VIT,
    "end to end": (*VIT, "--end-to-end"),
    "dit": ("train", "dit", "--steps", "12", *SIZES, "--samples", "4", "--sampling-steps", "3"),
    "bfloat16": (*VIT, "--bf16"),
    "masked-lm": (
        *("train", "masked-lm", "--steps", "6", "--batch-size", "2", "--context", "17"),
        *("--width", "8", "--heads", "2", "--windows", "2", "--points", "1"),
        *("--depth", "2", "--blocks", "2"),
    ),
    "recurrent": (
        *("train", "recurrent", "--steps", "6", "--end-to-end", "--batch-size", "2"),
        *("--context", "17", "--width", "8", "--heads", "2", "--windows", "2", "--points", "1"),
        *("--mean-recurrence", "2", "--backprop-depth", "1"),
    ),
}


@pytest.mark.parametrize("command", OTHERS.values(), ids=OTHERS.keys())
def test_a_run_goes_on_bit_for_bit(tmp_path, monkeypatch, command):
    """Also where all blocks train what they share, and where the network itself draws numbers."""
    if command[1] in ("recurrent", "masked-lm"):
        (tmp_path / "text.txt").write_text("the cat sat on the mat and then it ran away. " * 40)
        command = (*command, "--data", str(tmp_path / "text.txt"))
    train(tmp_path / "once", command=command)
    step = Trainer.step

    def halting(self, number):
        if number == 5:
            raise Halted
        return step(self, number)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", halting)
        with pytest.raises(Halted):
            train(tmp_path / "twice", "--checkpoint-every", "2", command=command)
    assert steps_kept(tmp_path / "twice") == [2, 4]
    train(tmp_path / "twice", "--checkpoint-every", "2", "--resume", command=command)
    assert same_weights(tmp_path / "once", tmp_path / "twice")


@pytest.mark.filterwarnings("default::UserWarning")
def test_frozen_blocks_merge_too(tmp_path):
    command = ("train", "vit", "--steps", "12", *SIZES, "--shared", "frozen")
    train(tmp_path / "whole", command=command)
    for block in range(3):
        train(tmp_path / "jobs", "--block", str(block), command=command)
    assert main(["merge", str(tmp_path / "jobs"), str(tmp_path / "jobs")]) == 0
    assert same_weights(tmp_path / "whole", tmp_path / "jobs")


def test_a_job_holds_its_block_only():
    alone = [ViTRun(block=b, width=12, heads=2, steps=2).trainer() for b in range(3)]
    whole = ViTRun(shared="private", width=12, heads=2, steps=2).trainer()
    for b, trainer in enumerate(alone):
        assert isinstance(trainer.model, Block)
        held = {name for name, _ in trainer.model.named_parameters()}
        assert {n.split(".")[2] for n in held if ".layers." in n} == {
            str(4 * b + i) for i in range(4)
        }
        mine = sum(p.numel() for p in whole.model.block_parameters(b))
        target = sum(p.numel() for p in whole.model.shared_parameters())
        assert sum(p.numel() for p in trainer.model.parameters()) == mine + target
        assert [o is None for o in trainer.block_optimizers.blocks] == [i != b for i in range(3)]


def test_what_does_not_fit_is_refused_by_name(tmp_path, capsys):
    out = ("--out", tmp_path / "out")
    error = mistake(capsys, *VIT, *out, "--block", "1", "--shared", "train")
    assert "shared must be private, frozen or reduce if one block is trained alone" in error
    assert "block must be in 0..2, got 3" in mistake(capsys, *VIT, *out, "--block", "3")
    error = mistake(capsys, *VIT, *out, "--block", "0", "--end-to-end")
    assert "block and shared must be left out end to end" in error
    error = mistake(capsys, *VIT, *out, "--checkpoint-every", "0")
    assert "--checkpoint-every must be a positive integer, got 0" in error
    assert "--keep must be a positive integer" in mistake(
        capsys, *VIT, *out, "--checkpoint-every", "1", "--keep", "0"
    )
    assert not (tmp_path / "out").exists()


def test_checkpoints_are_not_overwritten_unasked(tmp_path, capsys, monkeypatch):
    short = ("train", "vit", "--steps", "4", *SIZES, "--checkpoint-every", "2")
    train(tmp_path, command=short)
    assert steps_kept(tmp_path) == [2, 4]
    capsys.readouterr()
    error = mistake(capsys, *short, "--out", tmp_path)
    assert "--out must be a folder without checkpoints" in error
    error = mistake(capsys, *short, "--out", tmp_path, "--resume", "--lr", "0.5", "--seed", "3")
    assert "run.lr was 0.001 and is 0.5, run.seed was 0 and is 3" in error
    assert steps_kept(tmp_path) == [2, 4]
    train(tmp_path, "--overwrite", "--lr", "0.5", "--checkpoint-every", "3", command=short)
    assert steps_kept(tmp_path) == [3, 4]


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_full_disk_is_told_and_training_goes_on(tmp_path, capsys, monkeypatch):
    short = ("train", "vit", "--steps", "6", *SIZES, "--checkpoint-every", "2")
    from dblocks.scale import checkpoints

    written, save = [], checkpoints.save_safetensors

    def full(path, tensors):
        written.append(path)
        if 5 <= len(written) <= 8:
            raise OSError(28, "No space left on device")
        save(path, tensors)

    monkeypatch.setattr(checkpoints, "save_safetensors", full)
    train(tmp_path, command=short)
    error = capsys.readouterr().err
    assert "dblocks: warning: the checkpoint of step 4 was not written: " in error
    assert "No space left on device; that of step 2 is kept" in error
    assert steps_kept(tmp_path)[0] == 2


def test_a_loss_that_is_not_finite_keeps_the_checkpoints(tmp_path, capsys):
    short = ("train", "vit", "--steps", "30", *SIZES, "--checkpoint-every", "1", "--lr", "1e30")
    assert "must be finite" in mistake(capsys, *short, "--out", tmp_path)
    kept = steps_kept(tmp_path)
    assert kept
    for step in kept:
        file = tmp_path / f"checkpoints/step-{step:08d}/model.safetensors"
        assert all(t.isfinite().all() for t in load_safetensors(file).values())


def test_flags_reach_the_recipe(monkeypatch):
    given = {}
    monkeypatch.setattr(Recipe, "train", lambda _, run, out, **options: given.update(options))
    assert main(["train", "vit", "--checkpoint-every", "7", "--keep", "3", "--resume"]) == 0
    more = {"tensorboard": None, "kind": "small"}
    assert given == {"overwrite": False, "checkpoint_every": 7, "keep": 3, "resume": True, **more}


def test_what_is_merged_must_be_of_one_network(tmp_path, capsys, jobs):
    def merge(*folders):
        return mistake(capsys, "merge", tmp_path / "merged", *folders)

    blocks = [jobs / f"block-{b}" for b in range(3)]
    assert "got none of block 1" in merge(blocks[0], blocks[2])
    assert "block 0 must be given once" in merge(
        *blocks, shutil.copytree(blocks[0], tmp_path / "a")
    )
    assert "must hold a block.json, or folders that do" in merge(tmp_path / "none")
    with pytest.raises(ValueError, match="must hold a whole network, got one block"):
        load_model(blocks[0])
    train(tmp_path, "--block", "1", command=("train", "vit", "--steps", "2", *SIZES, "--seed", "4"))
    error = merge(blocks[0], tmp_path / "block-1", blocks[2])
    assert "the target embedding must be the same in all blocks" in error
    narrow = ("train", "vit", "--steps", "2", *SIZES, "--top-share", "0.5", "--block", "1")
    train(tmp_path / "b", command=narrow)
    error = merge(blocks[0], tmp_path / "b", blocks[2])
    assert "one configuration, got blocks_config.top_share of 0.6 in" in error
    cut = shutil.copytree(blocks[1], tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-5])
    assert "cut/model.safetensors cannot be used" in merge(blocks[0], cut, blocks[2])
    assert not (tmp_path / "merged").exists()


def test_tokenizers_must_be_one(tmp_path, capsys):
    small = ("--batch-size", "2", "--context", "17", "--width", "8", "--heads", "2", "--steps", "2")
    small += ("--windows", "2", "--depth", "2", "--blocks", "2", "--points", "1")
    texts = "abcd efgh. ", "abcz efgh. "
    for block, text in enumerate(texts):
        (tmp_path / f"{block}.txt").write_text(text * 60)
        for data in (0, 1):
            if block >= data:
                train(
                    tmp_path / str(data), "--data", str(tmp_path / f"{data}.txt"),
                    *("--block", str(block)), command=("train", "causal-lm", *small),
                )  # fmt: skip
    train(
        tmp_path / "0", "--data", str(tmp_path / "0.txt"), "--block", "1", "--overwrite",
        command=("train", "causal-lm", *small),
    )  # fmt: skip
    assert main(["merge", str(tmp_path / "merged"), str(tmp_path / "0")]) == 0
    sampled = ("sample", "causal-lm", "--checkpoint", str(tmp_path / "merged"), "--tokens", "4")
    assert main([*sampled, "--prompt", "abcd"]) == 0
    capsys.readouterr()
    error = mistake(
        capsys, "merge", tmp_path / "other", tmp_path / "0/block-0", tmp_path / "1/block-1"
    )
    assert "tokenizer.json must be the same for all blocks" in error


def test_a_merge_of_other_settings_warns_and_of_other_bytes_is_refused(tmp_path, jobs):
    folders = [tmp_path / f"{b}" for b in range(3)]
    for b, folder in enumerate(folders):
        shutil.copytree(jobs / f"block-{b}", folder)
    path = folders[1] / "block.json"
    about = json.loads(path.read_text())
    about["about"]["run"]["lr"] = 0.5
    del about["sha256"]["block.json"]
    path.write_text(json.dumps(about))
    with pytest.warns(UserWarning, match=r"different settings: lr .* and 0\.5"):
        merge_blocks(tmp_path / "merged", folders)
    weights = folders[2] / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-50] ^= 1
    weights.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"2/model\.safetensors cannot be used: it is not what was"
    ):
        merge_blocks(tmp_path / "again", folders)
