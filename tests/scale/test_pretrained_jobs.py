"""One job for each block of a pretrained model, and the model that their files make."""

from typing import Any

import pytest
import torch
from convert_tools import adamw, batch_of, model_of, shaken, task_of
from hub_tools import library

from dblocks import make_optimizers, train_step
from dblocks.__main__ import main
from dblocks.blocks import BlocksConfig
from dblocks.integrations.convert import ConvertedBlocks, convert
from dblocks.scale import convert_block
from tools import seeded

library("safetensors")
library("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")


def sizes_of(tied):
    return {"tie_word_embeddings": True} if tied else {}


@pytest.fixture
def jobs(tmp_path):
    """A function that makes the model of one job, of a Llama unless told otherwise."""

    def job(block, kind="llama", *, seed=3, tied=False, options=None, **config):
        model = shaken(model_of(kind, **sizes_of(tied)))
        model.save_pretrained(tmp_path / "model")

        def make():
            about: Any = model.config
            return type(model)(**about).eval() if kind == "dit" else type(model)(about).eval()

        given = BlocksConfig(**{"num_blocks": 2, "shared": "frozen", **config})
        torch.manual_seed(seed)
        folder = tmp_path / "model"
        return convert_block(make, folder, given, block, task=task_of(kind), **(options or {}))

    return job


def bytes_in(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def same(one, other):
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(v.equal(second[k]) for k, v in first.items())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("shared", ["frozen", "private"])
@pytest.mark.parametrize(
    ("kind", "tied"),
    [("llama", False), ("llama", True), ("gpt2", False), ("vit", False), ("dit", False)],
)
def test_the_files_of_all_jobs_are_the_whole_model(tmp_path, jobs, kind, tied, shared, order):
    out = tmp_path / "out"
    for b in order:
        found = jobs(b, kind, tied=tied, shared=shared)
        block = found.block(b)
        train_step(block, batch_of(kind), make_optimizers(block, adamw), generator=seeded())
        found.save_pretrained(out, block=b)
    model = shaken(model_of(kind, **sizes_of(tied)))
    loaded = ConvertedBlocks.from_pretrained(out, model_of(kind, **sizes_of(tied)))
    torch.manual_seed(3)
    config = BlocksConfig(num_blocks=2, shared=shared)
    together = convert(model, config, task=task_of(kind))
    for b in range(2):
        optimizers = make_optimizers(together, adamw)
        train_step(together, batch_of(kind), optimizers, block=b, generator=seeded())
    assert same(loaded, together)
    together.save_pretrained(tmp_path / "whole")
    assert bytes_in(out) == bytes_in(tmp_path / "whole")


OTHERS = {
    "options.embed_scale: 1.0 there, 4.0 here": {"options": {"embed_scale": 4.0}},
    "options.tokens_per_sigma: 1 there, None here": {"options": {"tokens_per_sigma": None}},
    "options.rows: 'single' there, 'doubled' here": {"options": {"rows": "doubled"}},
    "blocks_config.overlap: 0.05 there, 0.3 here": {"overlap": 0.3},
    "blocks_config.shared: 'frozen' there, 'private' here": {"shared": "private"},
    "blocks_config.num_blocks: 2 there, 4 here": {"num_blocks": 4},
}


@pytest.mark.parametrize("differs", OTHERS)
def test_jobs_of_other_options_are_refused(tmp_path, jobs, differs):
    out = tmp_path / "out"
    jobs(0).save_pretrained(out, block=0)
    before = bytes_in(out)
    other = jobs(1, **OTHERS[differs])
    for options in ({"block": 1}, {}):  # what is loaded is one block in both
        with pytest.raises(ValueError, match="must be of the same conversion") as caught:
            other.save_pretrained(out, **options)
        assert differs in str(caught.value)
        assert bytes_in(out) == before


def test_all_that_differs_is_listed(tmp_path, jobs):
    jobs(0).save_pretrained(tmp_path / "out", block=0)
    other = jobs(1, overlap=0.3, options={"embed_scale": 4.0})
    with pytest.raises(ValueError, match=r"overlap: .*; options\.embed_scale: .*; convert with"):
        other.save_pretrained(tmp_path / "out", block=1)


def test_a_whole_save_replaces_one_of_other_options(tmp_path):
    for scale in (1.0, 4.0):
        config = BlocksConfig(num_blocks=2, shared="frozen")
        whole = convert(model_of("llama"), config, task="tokens", embed_scale=scale)
        whole.save_pretrained(tmp_path)
    loaded = ConvertedBlocks.from_pretrained(tmp_path, model_of("llama"))
    assert loaded.options.embed_scale == 4.0


@pytest.mark.parametrize("shared", ["frozen", "private"])
def test_jobs_of_other_seeds_are_refused(tmp_path, jobs, shared):
    """What is drawn for all blocks; with private parameters that is a ViT's target embedding."""
    out = tmp_path / "out"
    jobs(0, "vit", shared=shared).save_pretrained(out, block=0)
    before = bytes_in(out)
    other = jobs(1, "vit", shared=shared, seed=4)
    with pytest.raises(ValueError, match=r"call the same torch\.manual_seed before convert_block"):
        other.save_pretrained(out, block=1)
    assert bytes_in(out) == before
    jobs(1, "vit", shared=shared).save_pretrained(out, block=1)
    jobs(0, "vit", shared=shared).save_pretrained(out, block=0)  # once more


def test_a_job_that_writes_meanwhile_is_noticed(tmp_path, jobs, monkeypatch):
    from dblocks.integrations.convert import files

    first, second, out = jobs(0), jobs(1, seed=4), tmp_path / "out"
    write, calls = files._card, []

    def and_another(blocks):
        calls.append(blocks)
        if blocks is second:
            first.save_pretrained(out, block=0)
        return write(blocks)

    monkeypatch.setattr(files, "_card", and_another)
    with pytest.raises(ValueError, match=r"torch\.manual_seed"):
        second.save_pretrained(out, block=1)
    assert calls == [second, first]
    assert sorted(bytes_in(out)) == [
        "README.md", "block_00.safetensors", "dblocks.json", "shared.safetensors"
    ]  # fmt: skip


@pytest.mark.parametrize("shared", ["train", "reduce"])
def test_shared_parameters_that_drift_apart_are_refused(jobs, shared):
    with pytest.raises(ValueError, match=rf"\('frozen', 'private'\) .* got '{shared}'"):
        jobs(1, shared=shared)


@pytest.mark.parametrize("shared", ["frozen", "private"])
def test_another_block_is_not_saved(tmp_path, jobs, shared):
    found = jobs(1, shared=shared)
    with pytest.raises(ValueError, match="block must be 1, the only one held here, got 0"):
        found.save_pretrained(tmp_path / "out", block=0)
    assert not (tmp_path / "out").exists()


def test_merge_says_how_converted_blocks_are_loaded(tmp_path, jobs, capsys):
    jobs(0).save_pretrained(tmp_path / "out", block=0)
    assert main(["merge", str(tmp_path / "merged"), str(tmp_path / "out")]) != 0
    assert "ConvertedBlocks.from_pretrained(folder, model)" in capsys.readouterr().err
