"""`dblocks plan`: its rows, what fits, and what it writes and refuses."""

import dataclasses
import json
import sys

import pytest

from dblocks.__main__ import main
from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.checkpoint import load_model, save_model
from dblocks.models import CausalLMConfig, ViT, ViTConfig
from dblocks.scale import save_block
from dblocks.scale.planner import Costs, Machine, Planner, of_network
from dblocks.scale.planner.plan import smallest_fitting
from tools import SIZES as OF_VIT

CONFIG = CausalLMConfig(vocab_size=13, context=16, width=16, depth=4, heads=2)
SIZES = ("--vocab-size", "13", "--context", "16", "--width", "16", "--depth", "4", "--heads", "2")
MACHINE = Machine(memory=2**30, link=1e6, flops=1e9)


@pytest.fixture(scope="module")
def costs():
    return Costs(of_network(CONFIG), 2)


def test_rows(costs):
    ways = Planner(costs, MACHINE).ways()
    assert [way.name for way in ways] == [
        "end to end", "checkpointing", "1 block", "2 blocks", "3 blocks", "4 blocks",
    ]  # fmt: skip
    for way in ways:
        held = way.parameters + way.optimizer
        assert held + max(way.activations, way.gradients) <= way.peak
        assert way.peak <= held + way.gradients + way.activations or way.name == "checkpointing"
    peaks = [way.peak for way in ways[2:]]
    assert peaks == sorted(peaks, reverse=True)
    assert ways[1].activations < ways[0].activations
    assert ways[1].compute_seconds > ways[0].compute_seconds


def test_the_fewest_blocks_that_fit(costs):
    ways = Planner(costs, MACHINE).ways()
    enough = dataclasses.replace(MACHINE, memory=ways[3].peak)
    assert smallest_fitting(Planner(costs, enough).ways()).blocks == 2
    too_little = dataclasses.replace(MACHINE, memory=ways[-1].peak - 1)
    assert smallest_fitting(Planner(costs, too_little).ways()) is None


def test_moved_bytes_and_time(costs):
    planner = Planner(costs, dataclasses.replace(MACHINE, steps_per_visit=5))
    way = planner.blocks(4)
    own = costs.by_layer[0]
    # In come parameters and moments, out go both.
    assert way.transfer == (2 * own.parameters + 2 * own.optimizer) / 5
    assert way.step_seconds == pytest.approx(way.compute_seconds + way.transfer / 1e6)
    everything = dataclasses.replace(planner.machine, prefetch="all")
    hidden = Planner(costs, everything).blocks(4)
    assert hidden.step_seconds == max(way.compute_seconds, way.transfer / 1e6)
    assert hidden.prefetched == own.parameters + own.optimizer
    assert hidden.peak == way.peak + hidden.prefetched
    # The overhead is the link's time beside the arithmetic's.
    assert way.overhead == pytest.approx(way.transfer / 1e6 / way.compute_seconds)
    assert hidden.overhead == pytest.approx(max(0, way.overhead - 1))
    assert planner.ways()[0].overhead == 0
    twice = Planner(costs, dataclasses.replace(MACHINE, steps_per_visit=10)).blocks(4)
    assert twice.overhead == pytest.approx(way.overhead / 2)


def test_devices_without_communication(costs):
    one = Planner(costs, dataclasses.replace(MACHINE, link=1e30)).blocks(4)
    four = Planner(costs, dataclasses.replace(MACHINE, devices=4)).blocks(4)
    more = Planner(costs, dataclasses.replace(MACHINE, devices=9)).blocks(4)
    assert four.transfer == 0
    assert four.tokens_per_second == pytest.approx(4 * one.tokens_per_second)
    assert (more.devices, more.tokens_per_second) == (4, four.tokens_per_second)


def test_the_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = ("--json", str(tmp_path / "plan.json"), "--chart", str(tmp_path / "plan.svg"))
    more = ("--train-tokens", "1G", "--devices", "2", "--blocks", "2", "--split", "memory")
    assert main(["plan", "causal-lm", *SIZES, "--memory", "24GiB", *files, *more]) == 0
    text = capsys.readouterr().out
    assert "The fewest blocks that fit into 24.00 GiB: 1" in text
    assert "1,000,000,000 tokens in 2 blocks" in text
    for word in ("modelled", "end to end", "checkpointing", "4 blocks", "layers_per_block=(2,2)"):
        assert word in text
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["modelled"] is True
    assert plan["smallest_fitting"] == 1
    assert [way["blocks"] for way in plan["ways"]] == [1, 1, 1, 2, 3, 4]
    assert plan["units_per_sample"] == 16
    assert "<svg" in (tmp_path / "plan.svg").read_text()


def mistake(capsys, *argv):
    assert main(["plan", *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--memory", "24"), "--memory must be a number of bytes such as 24GiB"),
        (("--link", "50GB"), "--link must be bytes a second such as 50GB/s"),
        (("--flops", "fast"), "--flops must be operations a second such as 400T"),
        (("--devices", "0"), "devices must be"),
        (("--batch-size", "0"), "batch_size must be"),
        (("--tokens", "17"), "tokens must be from 1 to 16"),
        (("--dtype", "bfloat16"), "--dtype must be float32 for causal-lm"),
        (("--shared", "train", "--devices", "2"), "--shared must be frozen or private"),
        (("--heads", "3"), "heads"),
        (("--json", "{folder}"), "--json must name a file, got the folder {folder}"),
        (("--chart", "{folder}"), "--chart must name a file, got the folder {folder}"),
        (("--json", "{folder}/no/plan.json"), "--json must be in a folder that exists"),
        (("--json", "/dev/full"), "--json must name a file that can be written, got: "),
    ],
)
def test_mistakes(capsys, tmp_path, flags, message):
    given = ("causal-lm", "--memory", "1GiB", *SIZES)
    flags = [flag.format(folder=tmp_path) for flag in flags]
    assert message.format(folder=tmp_path) in mistake(capsys, *given, *flags)


@pytest.mark.parametrize("name", ["plan.txt", "plan"])
def test_the_ending_of_a_chart(capsys, tmp_path, name):
    pytest.importorskip("matplotlib")
    flags = ("--memory", "1GiB", "--chart", str(tmp_path / name))
    error = mistake(capsys, "causal-lm", *SIZES, *flags)
    assert "--chart must end in one of " in error
    assert " png, " in error
    assert list(tmp_path.iterdir()) == []


VIT = ("--image-size", "8", "--patch-size", "4", "--width", "16", "--depth", "2", "--heads", "2")


@pytest.mark.parametrize("kind", ["vit", "dit"])
def test_images_have_no_tokens_to_choose(capsys, kind):
    sizes = ("--memory", "1GiB", *VIT)
    error = mistake(capsys, kind, *sizes, "--tokens", "5")
    assert f"--tokens must be left out for {kind}, whose samples are images, got 5" in error


def test_neither_have_those_of_other_libraries(capsys, tmp_path):
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "image_size": 8}
    sizes |= {"num_attention_heads": 2, "patch_size": 4, "num_channels": 1, "num_labels": 3}
    config = {"model_type": "vit", "architectures": ["ViTForImageClassification"], **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    error = mistake(capsys, str(tmp_path), "--memory", "1GiB", "--tokens", "5")
    assert "--tokens must be left out for ViTForImageClassification" in error


def test_the_sizes_are_printed(capsys, tmp_path):
    file = tmp_path / "plan.json"
    sizes = ("--batch-size", "3", "--memory", "1GiB", "--json", str(file))
    assert main(["plan", "vit", *VIT, *sizes]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("vit, 2 layers, batches of 3 of images of 3 x 8 x 8; one device")
    plan = json.loads(file.read_text())
    assert (plan["samples"], plan["sample"]) == (3, "images of 3 x 8 x 8")
    assert main(["plan", "causal-lm", *SIZES, "--tokens", "9", "--memory", "1GiB"]) == 0
    assert "layers, batches of 1 of 9 tokens; one" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nonesuch", "llamma3", "vitt"])
def test_names_that_nobody_has(capsys, name):
    pytest.importorskip("transformers")
    error = mistake(capsys, name, "--memory", "1GiB")
    assert error.count(repr(name)) == 1
    assert "; networks of dblocks are vit, causal-lm, masked-lm, recurrent, dit" in error
    assert len(error) < 300


def test_blocks_beyond_the_layers_and_unknown_models(capsys, tmp_path):
    given = ("causal-lm", "--memory", "1GiB", *SIZES)
    assert "--blocks must be from 1 to the number of layers, 4, got 5" in mistake(
        capsys, *given, "--blocks", "5"
    )
    missing = str(tmp_path / "none.json")
    assert "must be a folder or file that exists" in mistake(capsys, missing, "--memory", "1GiB")


def test_without_matplotlib_the_extra_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    flags = ("--memory", "1GiB", "--chart", str(tmp_path / "plan.svg"))
    assert "dblocks[bench]" in mistake(capsys, "causal-lm", *SIZES, *flags)


def test_a_network_that_was_saved(capsys, tmp_path):
    """By its folder or its file; a folder of blocks says what to do with it."""
    network = ViT(ViTConfig(**OF_VIT))
    whole = DiffusionBlocks(network, BlocksConfig(num_blocks=2, shared="private"))
    save_model(tmp_path / "whole", whole)
    for b in range(2):
        save_block(tmp_path / f"blocks/{b}", whole.block(b))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in OF_VIT.items()]
    said = []
    for source in (["vit", *flags], [tmp_path / "whole"], [tmp_path / "whole/config.json"]):
        assert main(["plan", *map(str, source), "--memory", "1GiB"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2]
    for source, words in (
        ("blocks", f"got folders of blocks: 0, 1; `dblocks merge {tmp_path / 'blocks'} {tmp_path}"),
        ("blocks/0", "got one block; `dblocks merge` merges"),
    ):
        for verb in (["plan"], ["eval", "vit", "--checkpoint"]):
            more = ["--memory", "1GiB"] if verb == ["plan"] else []
            assert main([*verb, str(tmp_path / source), *more]) == 2
            assert words in capsys.readouterr().err
    with pytest.raises(ValueError, match="folders of blocks: 0, 1"):
        load_model(tmp_path / "blocks")
