"""Sharded blocks, and the numbers that FSDP takes no 0-d parameters for."""

import os
import subprocess
import sys

import pytest
import torch
from convert_tools import blocks_of
from hub_tools import library

from lm_tools import lm_of
from tools import ROOT, vit

HERE = ROOT / "tests" / "blocks"


def in_two_processes(script, folder):
    """What the two wrote, each run of the script having ended well."""
    folders = [ROOT, ROOT / "tests"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    # Sets of strings have another order in each process.
    seeds = [{"PYTHONHASHSEED": str(rank)} for rank in range(2)]
    runs = [
        subprocess.Popen(
            [sys.executable, str(HERE / script), str(folder), str(rank)],
            cwd=ROOT, env=environment | seeds[rank],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        written = [run.communicate(timeout=180)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    for run, text in zip(runs, written, strict=True):
        assert run.returncode == 0, text
    return written


def test_a_step_of_two_processes_is_that_of_one(tmp_path):
    """Layers sharded and the whole, without a word about which methods are forwards."""
    library("transformers")
    for text in in_two_processes("sharded.py", tmp_path):
        assert text.count("right") == 5


def test_a_step_of_data_parallel_processes_is_that_of_one(tmp_path):
    """And a DTensor is refused by an op."""
    library("transformers")
    for text in in_two_processes("parallel.py", tmp_path):
        assert text.count("right") == 3


@pytest.mark.parametrize("make", [vit, lm_of])
def test_no_parameter_is_0_d_and_old_files_load(make):
    network = make()
    assert all(p.ndim for p in network.parameters())
    old = {n: t[0] if t.shape == (1,) else t for n, t in network.state_dict().items()}
    assert any(t.ndim == 0 for t in old.values())
    for options in ({}, {"assign": True}):
        fresh = make()
        with torch.no_grad():
            fresh.noise_scale.fill_(7)
        fresh.load_state_dict(old, **options)
        assert fresh.noise_scale.shape == (1,)
        assert fresh.noise_scale.equal(network.noise_scale)


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_old_files_of_converted_models_load(kind):
    blocks = blocks_of(kind, head="learned")
    assert all(p.ndim for p in blocks.parameters())
    state = blocks.state_dict()
    old = {n: t[0] if n.endswith("_scale") else t for n, t in state.items()}
    assert sum(t.ndim == 0 for t in old.values()) == 2
    fresh = blocks_of(kind, head="learned")
    fresh.load_state_dict(old)
    assert all(t.equal(state[n]) for n, t in fresh.state_dict().items())
