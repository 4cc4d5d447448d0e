"""The launchers of docs/scale.md start two processes, of which each trains and saves its block.

That the page's examples run in one process is tested with those of all pages.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys

import pytest

from tools import ROOT

PAGE = ROOT / "docs" / "scale.md"
LAUNCHERS = {
    # accelerate itself starts one process where there is no GPU.
    "accelerate": ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    "lightning_fabric": ("-m", "lightning_fabric.cli", "--accelerator", "cpu", "--devices", "2"),
}
BEFORE = """
import torch
from dblocks import BlocksConfig, DiffusionBlocks, make_optimizers, train_step
from dblocks.models import CausalLM, CausalLMConfig

batch = {"tokens": torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))}
"""


@pytest.mark.parametrize("package", LAUNCHERS)
def test_the_page_has_an_example(package):
    assert len(examples(package)) == 1


@pytest.mark.long
@pytest.mark.parametrize("package", LAUNCHERS)
def test_two_processes_train_two_blocks(package, tmp_path):
    pytest.importorskip(package)
    (code,) = examples(package)
    (tmp_path / "train.py").write_text(BEFORE + code)
    launcher = LAUNCHERS[package]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    output = tmp_path / "output"
    with output.open("w") as written:
        run = subprocess.Popen(
            [sys.executable, *launcher, "train.py"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            stdout=written, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        code = run.wait(600)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)  # what it started too
    assert code == 0, output.read_text()
    found = sorted(tmp_path.glob("runs/*/*/block.json"))
    assert [json.loads(path.read_text())["block"] for path in found] == [0, 1]


def examples(package):
    """The code of the page that needs a package."""
    block = re.compile(rf"<!-- needs: {package} -->\n```python\n(.*?)```", re.S)
    return block.findall(PAGE.read_text())
