"""Copies of what blocks share that are averaged, in one process and in one for each block."""

import json

import pytest
import torch
from process_tools import in_processes

from dblocks.__main__ import main
from dblocks.blocks import BlocksConfig, DiffusionBlocks, make_optimizers, train_step
from dblocks.scale import average_shared, resident
from lm_tools import lm_of, tokens_of
from tools import randomized, seeded

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = ("--batch-size", "8", "--width", "12", "--depth", "3", "--heads", "2", "--points", "1")
VIT = ("train", "vit", "--steps", "20", "--shared", "reduce", "--reduce-every", "6", *SIZES)


def model_of(shared="reduce"):
    return DiffusionBlocks(randomized(lm_of(depth=3)), BlocksConfig(3, shared=shared))


def trained(model, steps=6, **options):
    optimizers = make_optimizers(model, lambda p: torch.optim.AdamW(p, lr=1e-2))
    if options:
        resident(model, optimizers, "cpu", **options)
    generator = seeded(3)
    for step in range(steps):
        train_step(model, {"tokens": tokens_of()}, optimizers, generator=generator)
        if model.config.shared == "reduce" and step % 2:
            average_shared(model)
    return optimizers


def copies_of(model):
    """The copy of each block of what is outside the layers, by name; without the target."""
    target = {id(p) for p in model.shared_parameters()}
    first, *others = [model.base_model, *model.copies]
    names = [n for n, p in first.named_parameters() if id(p) not in target]
    names = [n for n in names if not n.startswith("layers.")]
    return [{n: m.get_parameter(n) for n in names} for m in (first, *others)]


def shaken():
    """A model whose copies differ."""
    model = model_of()
    for number, copied in enumerate(copies_of(model)):
        for p in copied.values():
            p.data += 0.01 * torch.randn(p.shape, generator=seeded(number), dtype=p.dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_copies_become_their_mean_and_nothing_else_changes(dtype):
    model = shaken().to(dtype)
    frozen = [list(copied.values())[-1].requires_grad_(False) for copied in copies_of(model)]
    before = {n: p.clone() for n, p in model.named_parameters()}
    wanted = [{n: p.double() for n, p in copied.items()} for copied in copies_of(model)]
    average_shared(model)
    moved = set()
    for number, copied in enumerate(copies_of(model)):
        for name, p in copied.items():
            if p is frozen[number]:
                continue
            mean = sum(w[name] for w in wanted) / 3
            bound = 2 * torch.finfo(dtype).eps * mean.abs().max()
            assert (p.double() - mean).abs().max() <= bound
            assert torch.equal(p, copies_of(model)[0][name])
            moved.add(id(p))
    assert len(moved) > 9
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (id(p) not in moved), name
    # Of equal copies it changes no bit.
    again = {n: p.clone() for n, p in model.named_parameters()}
    average_shared(model)
    assert all(torch.equal(p, again[n]) for n, p in model.named_parameters())


def test_a_resident_model_is_averaged_to_the_same_bits():
    one, other = model_of(), model_of()
    trained(one)
    trained(other, prefetch="all")
    other.residency.close()
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def test_what_cannot_be_averaged_is_refused():
    with pytest.raises(ValueError, match=r"must have shared='reduce'.* got 'private'"):
        average_shared(model_of("private"))
    with pytest.raises(RuntimeError, match="got no process group"):
        average_shared(model_of().block(1))
    with pytest.raises(TypeError, match="must be a DiffusionBlocks"):
        average_shared(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"shared must be one of .*'reduce'\), got 'sum'"):
        BlocksConfig(3, shared="sum")


def train_jobs(command, out, folder):
    arguments = ["-m", "dblocks", *command, "--out", out]
    of_rank = {"of_rank": lambda rank: ("--block", rank)}
    codes, written = in_processes(3, arguments, folder, **of_rank)
    assert codes == [0, 0, 0], "\n".join(written)


def test_jobs_of_one_block_each_average_to_the_bits_of_one_run(tmp_path, capsys):
    assert main([*VIT, "--out", str(tmp_path / "whole")]) == 0
    train_jobs(VIT, tmp_path / "jobs", tmp_path)
    assert main(["merge", str(tmp_path / "merged"), str(tmp_path / "jobs")]) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "merged")]
    assert weights[0] == weights[1]
    record = json.loads((tmp_path / "whole/run.json").read_text())
    assert record["run"]["reduce_every"] == 6
    assert record["blocks"]["shared"] == "reduce"
    # Blocks of other averages do not merge.
    other = [*VIT[:3], "4", *VIT[4:]]
    train_jobs(other, tmp_path / "others", tmp_path)
    folders = [str(tmp_path / f) for f in ("jobs/block-0", "others/block-1", "jobs/block-2")]
    capsys.readouterr()
    assert main(["merge", str(tmp_path / "no"), *folders]) == 2
    assert "the average of the shared parameters must be the same" in capsys.readouterr().err


OTHERS = """
import os

import pytest
import torch.distributed as dist
from scale.test_sharing import model_of

from dblocks.scale import average_shared

rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
average_shared(model_of().block(rank), step=7)
for blocks, step, words in (
    ((0, 0, 2), 7, r"got blocks \\[0, 0, 2\\]"),
    ((0, 1, 2), (5, 9, 9)[rank], r"got \\[5, 9, 9\\].*after step 5"),
):
    with pytest.raises(ValueError, match=words):
        average_shared(model_of().block(blocks[rank]), step=step)
dist.destroy_process_group()
"""


def test_processes_that_do_not_fit_together_all_refuse(tmp_path):
    script = tmp_path / "others.py"
    script.write_text(OTHERS)
    codes, written = in_processes(3, [script], tmp_path)
    assert codes == [0, 0, 0], "\n".join(written)


def test_a_job_alone_and_flags_that_do_not_fit_are_refused(tmp_path, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    out = ("--out", str(tmp_path))
    assert main([*VIT, *out, "--block", "1"]) == 2
    assert "set RANK=1 WORLD_SIZE=3, and MASTER_ADDR" in capsys.readouterr().err
    assert main(["train", "vit", *out, "--reduce-every", "5"]) == 2
    assert "--reduce-every must be left out without --shared reduce" in capsys.readouterr().err
    assert main([*VIT, *out, "--reduce-every", "0"]) == 2
    assert "--reduce-every must be a positive integer, got 0" in capsys.readouterr().err
