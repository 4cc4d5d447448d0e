"""Blocks x data-parallel processes: the network that one process trains."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from construction_tools import Own
from process_tools import in_processes
from test_docs import page
from torch import nn

from dblocks.__main__ import main
from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.checkpoint import load_safetensors
from dblocks.scale import build_block, data_parallel
from dblocks.scale.mesh import check_layout, rows_of
from tools import vit

STOPPING = """
import os, sys, time
from dblocks.__main__ import main
from dblocks.recipes.trainer import Trainer

step = Trainer.step

def stopping(self, number):
    time.sleep(0.01)
    if number == 20 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), 15)
    return step(self, number)

Trainer.step = stopping
sys.exit(main(sys.argv[1:]))
"""
FULL = """
import os, resource, sys
from dblocks.__main__ import main
from safetensors import torch as files

if os.environ["RANK"] == "1":
    save = files.save_file

    def full(*arguments, **more):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
        try:
            save(*arguments, **more)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    files.save_file = full
sys.exit(main(sys.argv[1:]))
"""
RACE = """
import os, pathlib, time
here = pathlib.Path.cwd()
os.environ["DBLOCKS_CACHE"] = str(here / "cache")
from dblocks.recipes.data import text

text.IN_MEMORY = 0
(here / ("ready-" + os.environ["RANK"])).touch()
until = time.monotonic() + 200
while len(list(here.glob("ready-*"))) < 3 and time.monotonic() < until:
    time.sleep(0.001)
corpus = text.load_corpus(str(here / "text.txt"))
print(corpus.sha256, corpus.training.tokens.sum().item(), corpus.evaluated.tokens.tolist()[:50])
"""
pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = ("--batch-size", "8", "--width", "12", "--heads", "2", "--points", "2")
VIT = ("train", "vit", "--steps", "9", *SIZES)
TWO = (*VIT, "--blocks", "2", "--depth", "2")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Both blocks in one process."""
    out = tmp_path_factory.mktemp("whole")
    assert main([*TWO, "--shared", "private", "--out", str(out)]) == 0
    return out


def launch(folder, count, *argv):
    """Trains in so many processes, into a folder."""
    command = [*map(str, argv), "--out", str(folder / "out")]
    codes, written = in_processes(count, ["-m", "dblocks", *command], folder)
    assert codes == [0] * count, "\n".join(written)
    return written


def words(text):
    return " ".join(text.split())


def weights(folder):
    return load_safetensors(folder / "model.safetensors")


def assert_near(found, wanted):
    found, wanted = weights(found), weights(wanted)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        # Under Adam a gradient that is 0 but for rounding moves a weight by up to a step.
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


def losses(folder):
    curves = [json.loads((folder / f"block-{b}/run.json").read_text())["curve"] for b in (0, 1)]
    return torch.tensor([c[-1]["block_loss"][b] for b, c in enumerate(curves)])


def without_the_last(folder, to):
    """The run as if it had ended after its first checkpoint."""
    shutil.copytree(folder, to)
    for last in to.glob("out/block-*/checkpoints/step-00000009"):
        shutil.rmtree(last)


@pytest.mark.parametrize("sharding", ["ddp", pytest.param("fsdp", marks=pytest.mark.long)])
def test_two_blocks_by_two_processes_each(tmp_path, whole, sharding):
    written = launch(tmp_path, 4, *TWO, "--checkpoint-every", "5", "--sharding", sharding)
    out = tmp_path / "out"
    assert_near(out, whole)
    own = [json.loads((out / f"block-{b}/run.json").read_text())["steps_of_block"] for b in (0, 1)]
    assert sum(own) == 9
    assert own[0] != own[1]
    assert [bool(text) for text in written] == [True, False, True, False]
    kept = sorted(path.name for path in out.glob("block-0/checkpoints/*/*"))
    assert set(kept) == {
        "checksums.txt", "generator.safetensors", "model.safetensors", "optimizers.safetensors",
        "random.safetensors", "state.json",
    }  # fmt: skip
    if sharding == "fsdp":
        # With as many processes it goes on bit for bit; with another number, and all of a block in
        # each, to rounding.
        for count, how in ((4, "fsdp"), (2, "ddp")):
            again = tmp_path / f"again-{count}"
            without_the_last(tmp_path, again)
            launch(again, count, *TWO, "--resume", "--sharding", how)
            torch.testing.assert_close(losses(again / "out"), losses(out), rtol=1e-5, atol=1e-6)
            same = (again / "out/model.safetensors").read_bytes()
            assert (same == (out / "model.safetensors").read_bytes()) == (count == 4)


def test_a_process_for_each_of_four_blocks_is_one_run_bit_for_bit(tmp_path):
    four = (*VIT, "--blocks", "4", "--depth", "4")
    assert main([*four, "--shared", "private", "--out", str(tmp_path / "one")]) == 0
    first, *_ = launch(tmp_path, 4, *four)
    found, wanted = weights(tmp_path / "out"), weights(tmp_path / "one")
    assert all(found[name].equal(tensor) for name, tensor in wanted.items())
    found, wanted = (json.loads((tmp_path / f / "run.json").read_text()) for f in ("out", "one"))
    results = ("accuracy", "blocks_alone", "accuracy_by_denoising_steps", "model", "blocks")
    assert [found[name] for name in results] == [wanted[name] for name in results]
    assert [part["block"] for part in found["merged"]] == [0, 1, 2, 3]
    parts = [json.loads((tmp_path / f"out/block-{b}/run.json").read_text()) for b in range(4)]
    for name in ("activations_mib", "state_mib", "process_mib"):
        assert found[name] == max(part[name] for part in parts)
    assert found["seconds"] == pytest.approx(sum(part["seconds"] for part in parts), abs=0.01)
    assert found["samples"] == wanted["samples"]
    assert f"{found['state_mib']:.1f}" in words(first)
    assert "peak saved activations (MiB)" in words(first)
    assert f"held-out accuracy {100 * wanted['accuracy']:.1f} %" in words(first)


@pytest.mark.long
def test_more_blocks_than_processes_and_one_block_by_all(tmp_path):
    three = (*VIT, "--blocks", "3", "--depth", "3")
    assert main([*three, "--shared", "private", "--out", str(tmp_path / "one")]) == 0
    launch(tmp_path, 2, *three)
    found, wanted = weights(tmp_path / "out"), weights(tmp_path / "one")
    assert all(found[name].equal(tensor) for name, tensor in wanted.items())
    alone = tmp_path / "alone"
    alone.mkdir()
    launch(alone, 2, *three, "--block", "1")
    for name, tensor in weights(alone / "out/block-1").items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_a_signal_to_one_process_ends_those_of_its_block_after_one_checkpoint(tmp_path):
    script = tmp_path / "stopping.py"
    script.write_text(STOPPING)
    command = [*TWO[:3], "400", *TWO[4:], "--block", "0", "--checkpoint-every", "300"]
    command += ["--out", str(tmp_path / "out")]
    codes, written = in_processes(2, [script, *command], tmp_path)
    assert codes == [143, 143], written
    assert re.fullmatch(r"dblocks: interrupted after step 2\d of 400; --resume .*\n", written[0])
    assert written[1] == ""
    assert len(list(tmp_path.glob("out/block-0/checkpoints/step-*"))) == 1


def test_a_process_with_a_full_disk_ends_all_and_loses_nothing(tmp_path, whole):
    """Its checkpoints are left out with a warning, what cannot be saved in the end is an error."""
    script = tmp_path / "full.py"
    script.write_text(FULL)
    command = [*TWO, "--checkpoint-every", "4", "--out", str(tmp_path / "out")]
    codes, written = in_processes(2, [script, *command], tmp_path)
    assert codes == [2, 2], written
    first, second = (text.splitlines() for text in written)
    assert first[-1].startswith("dblocks: error: all processes must train their blocks, but")
    assert "process 1 failed" in first[-1]
    assert "dblocks: warning: the checkpoint of step 4 was not written" in second[0]
    assert "there is none yet" in second[0]
    assert second[-1].startswith(f"dblocks: error: {tmp_path}/out/block-1 cannot be written: ")
    assert not any("Traceback" in line for line in (*first, *second))
    assert not (tmp_path / "out" / "model.safetensors").exists()
    block = (*TWO, "--out", str(tmp_path / "out"), "--block", "1", "--resume")
    assert main([*block, "--checkpoint-every", "4"]) == 0
    merged = str(tmp_path / "merged")
    assert main(["merge", merged, str(tmp_path / "out")]) == 0
    found, wanted = weights(tmp_path / "merged"), weights(whole)
    assert all(found[name].equal(tensor) for name, tensor in wanted.items())


def test_the_recipe_of_the_paper_prints_its_rows_too(tmp_path):
    rows = np.random.default_rng(0).integers(0, 256, (104, 3074), dtype=np.uint8)
    rows[:, 0], rows[:, 1] = 0, np.arange(104) % 100
    (tmp_path / "train.bin").write_bytes(rows[:100].tobytes())
    (tmp_path / "test.bin").write_bytes(rows[100:].tobytes())
    command = ("train", "vit", "--recipe", "paper", "--data-path", str(tmp_path), "--steps", "3")
    command += ("--points", "1", "--device", "cpu", "--no-bf16", "--width", "24", "--heads", "2")
    first, second = launch(tmp_path, 2, *command, "--depth", "4", "--batch-size", "4")
    assert [f"block {b} of 3" in first for b in range(3)] == [True, False, True]
    assert "block 1 of 3" in second
    assert "published" in first
    assert "steps 3 (" in first
    assert "published" not in second
    assert "accuracy" in json.loads((tmp_path / "out" / "run.json").read_text())


def test_processes_that_make_one_cache_at_the_same_time(tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat and then it ran away. " * 2000)
    (tmp_path / "race.py").write_text(RACE)
    codes, written = in_processes(3, [tmp_path / "race.py"], tmp_path)
    assert codes == [0, 0, 0], written
    assert len({*written}) == 1
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".bin", ".json"]


def test_what_does_not_divide_is_refused_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for flags, words in (
        ((), "processes must be at most the number of blocks, 2, or a multiple of it, got 3"),
        (("--end-to-end",), "--end-to-end trains in one process"),
    ):
        assert main([*TWO, *flags, "--out", str(tmp_path / "out")]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    check_layout(2, 6)
    check_layout(5, 3)
    assert [rows_of(5, rank, 3) for rank in range(3)] == [(0, 3), (1, 4), (2,)]


def test_what_is_trained_together_is_checked():
    model = DiffusionBlocks(vit(), BlocksConfig(2))
    with pytest.raises(ValueError, match="sharding must be one of"):
        data_parallel(model, None, "zero")
    with pytest.raises(TypeError, match="must be a DiffusionBlocks or a Block, got ViT"):
        data_parallel(vit(), None)
    with pytest.raises(ValueError, match="not frozen"):
        data_parallel(model.requires_grad_(False), None)


def test_layers_that_share_a_parameter_are_not_sharded_apart():
    def make():
        network = Own(lambda: [nn.Linear(9, 9) for _ in range(4)])
        network.layers[1].weight = network.layers[0].weight
        return network

    message = r"got .*layers\.0\.weight and .*layers\.1\.weight; use 'ddp'"
    whole = DiffusionBlocks(make(), BlocksConfig(2))
    for model in (build_block(make, BlocksConfig(2), 0), whole):
        with pytest.raises(ValueError, match=f"share parameters under 'fsdp', {message}"):
            data_parallel(model, None, "fsdp")
        weights = dict(model.named_parameters(remove_duplicate=False))
        first, second = (
            weights[name] for name in weights if name.endswith((".0.weight", ".1.weight"))
        )
        assert first is second  # nothing was changed


def test_the_examples_of_the_page_are_the_same_in_two_processes(tmp_path, capsys):
    blocks = [code for _, code, _ in page("scale.md").blocks]
    first = next(i for i, code in enumerate(blocks) if "init_process_group" in code)
    imports = [line for line in blocks[0].splitlines() if line.startswith(("import", "from"))]
    script = "\n".join([*imports, *blocks[first : first + 2], "print(losses)"])

    path = tmp_path / "page.py"
    path.write_text(script)
    exec(compile(script, "scale.md", "exec"), {})
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    codes, written = in_processes(2, [path], tmp_path)
    assert codes == [0, 0], written
    for text in written:
        torch.testing.assert_close(
            torch.tensor(json.loads(text.splitlines()[-1])), torch.tensor(alone)
        )
