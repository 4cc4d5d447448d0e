"""What people use around a model works around a converted one."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from convert_tools import (
    ALL,
    adamw,
    batch_of,
    blocks_of,
    model_of,
    plain_logits,
    shaken,
    switch_on_checkpoints,
    without_dropout,
)
from hub_tools import library
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dblocks import make_optimizers, train_step
from dblocks.blocks.memory import SavedActivations
from dblocks.sampling import initial_noise, next_token_nll, sample_euler
from tools import DEVICE, ROOT, normal, seeded

pytestmark = pytest.mark.usefixtures("one_thread")
SOME = ("llama", "bert", "vit", "timm", "dit")


def as_dtype(batch, dtype):
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def gradients(blocks, kind, block, draw):
    loss = blocks.loss_at(batch_of(kind), block, draw).loss
    parameters = [p for p in blocks.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, parameters, allow_unused=True)


@pytest.mark.parametrize("whole", [False, True], ids=["model", "all"])
@pytest.mark.parametrize("kind", ALL)
def test_bfloat16(kind, whole):
    """Of the model alone, before it is converted, or of everything, after."""
    model = model_of(kind)
    blocks = shaken(blocks_of(kind, model=model if whole else model.bfloat16()))
    blocks = blocks.bfloat16() if whole else blocks
    batch = as_dtype(batch_of(kind), torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    added = {p.dtype for n, p in blocks.named_parameters() if ".model." not in n}
    assert added <= ({torch.bfloat16} if whole or kind == "dit" else {torch.float32})
    loss = blocks.loss(batch, 1, generator=seeded()).loss
    rounded = as_dtype(batch, torch.float32)  # what is left is the arithmetic
    expected = copy.deepcopy(blocks).float().loss(rounded, 1, generator=seeded()).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.1, atol=0.1)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in blocks.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", ALL)
def test_autocast(kind):
    blocks, batch = shaken(blocks_of(kind)), batch_of(kind)
    exact = blocks.loss(batch, 1, generator=seeded()).loss
    optimizers = make_optimizers(blocks, adamw)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        result = train_step(blocks, batch, optimizers, block=1, generator=seeded())
    torch.testing.assert_close(result.loss, exact, rtol=0.1, atol=0.1)
    assert not result.loss.equal(exact)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in blocks.parameters())


@pytest.mark.parametrize("shared", ["train", "private"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "vit", "timm", "dit"])
def test_the_models_own_switch_checkpoints_its_layers(kind, shared):
    model = model_of(kind)
    blocks = shaken(blocks_of(kind, model=model, config={"shared": shared})).train()
    without_dropout(blocks)
    draw, sizes, found = blocks.draw(batch_of(kind), 1, generator=seeded()), [], []
    for checkpointing in (False, True):
        if checkpointing:
            switch_on_checkpoints(model)
        with SavedActivations(blocks.parameters()) as saved:
            result = blocks.loss_at(batch_of(kind), 1, draw)
        sizes.append(saved.bytes)
        found.append(gradients(blocks, kind, 1, draw))
        view = blocks.block(1)
        with SavedActivations(view.parameters()) as saved:
            alone = view.loss_at(batch_of(kind), 1, draw)
        assert saved.bytes == sizes[-1]
        assert alone.loss.equal(result.loss)
    assert sizes[1] < 0.6 * sizes[0]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", SOME)
def test_an_average_of_the_weights(kind):
    blocks, batch = shaken(blocks_of(kind)), batch_of(kind)
    average = AveragedModel(blocks, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizers, seen = make_optimizers(blocks, adamw), []
    for step in range(2):
        train_step(blocks, batch, optimizers, block=1, generator=seeded(step))
        average.update_parameters(blocks)
        seen.append([p.detach().clone() for p in blocks.parameters()])
    for got, first, second in zip(average.module.parameters(), *seen, strict=True):
        torch.testing.assert_close(got, 0.5 * first + 0.5 * second)
    if kind == "llama":
        assert next_token_nll(average, batch["tokens"]).isfinite().all()
    if kind in ("vit", "timm", "dit"):
        z = initial_noise((3, 1, 8, 8) if kind == "dit" else (3, 16), blocks.config.schedule)
        given = {k: v for k, v in batch.items() if k != ("images" if kind == "dit" else "labels")}
        found = sample_euler(average.module, z, blocks.config.schedule.steps(4), **given)
        assert found.isfinite().all()
        assert not found.equal(sample_euler(blocks, z, blocks.config.schedule.steps(4), **given))


@pytest.mark.parametrize("kind", ["llama", "timm"])
def test_accelerate_trains_one_block(kind):
    accelerate = library("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    blocks = shaken(blocks_of(kind))
    by_hand = copy.deepcopy(blocks)
    accelerator = accelerate.Accelerator(cpu=DEVICE.type == "cpu")
    block = blocks.block(1)
    prepared, optimizer = accelerator.prepare(block, adamw(block.parameters()))
    loss = accelerator.unwrap_model(prepared).loss(batch_of(kind), generator=seeded()).loss
    accelerator.backward(loss)
    optimizer.step()
    block = by_hand.block(1)
    optimizer = adamw(block.parameters())
    block.loss(batch_of(kind), generator=seeded()).loss.backward()
    optimizer.step()
    assert all(a.equal(b) for a, b in zip(blocks.parameters(), by_hand.parameters(), strict=True))


# peft


def lora(kind, modules):
    peft = library("peft")
    return peft, peft.LoraConfig(r=2, target_modules=modules, init_lora_weights=False)


TARGETS = {"llama": ["q_proj", "down_proj"], "bert": ["query", "dense"], "timm": ["qkv", "fc1"]}
# The last is what transformers 4 calls a ViT's.
TARGETS |= {"gpt2": ["c_attn"], "dit": ["to_q"], "vit": ["q_proj", "query"]}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "timm", "dit"])
def test_lora_in_one_block(kind):
    peft, config = lora(kind, TARGETS[kind])
    blocks, batch = shaken(blocks_of(kind)), batch_of(kind)
    before = [blocks.loss(batch, b, generator=seeded()).loss for b in range(2)]
    blocks.requires_grad_(False)
    first, last = blocks.layer_ranges[1]
    for name in blocks.base_model.names[first:last]:
        peft.inject_adapter_in_model(config, blocks.base_model.model.get_submodule(name))
    trained = {n for n, p in blocks.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert trained <= {n for n, _ in blocks.block(1).named_parameters()}
    after = [blocks.loss(batch, b, generator=seeded()).loss for b in range(2)]
    assert after[0].equal(before[0])
    assert not after[1].equal(before[1])  # these adapters do not start at zero
    kept = {n: p.clone() for n, p in blocks.named_parameters()}
    train_step(blocks, batch, make_optimizers(blocks, adamw), block=1, generator=seeded())
    changed = {n for n, p in blocks.named_parameters() if not p.equal(kept[n])}
    assert changed == trained
    with pytest.raises(ValueError, match="block 0 must have an optimizer"):
        train_step(blocks, batch, make_optimizers(blocks, adamw), block=0)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "vit", "timm"])
def test_a_model_inside_peft_is_converted(kind):
    peft, config = lora(kind, TARGETS.get(kind))
    wrapped = peft.get_peft_model(model_of(kind), config)
    batch = batch_of(kind)
    expected = plain_logits(kind, wrapped, batch)
    blocks = blocks_of(kind, model=wrapped)
    assert plain_logits(kind, blocks.base_model, batch).equal(expected)
    own = {n for n, p in wrapped.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in own)
    kept = {n: p.clone() for n, p in wrapped.named_parameters()}
    train_step(blocks, batch, make_optimizers(blocks, adamw), block=1, generator=seeded())
    changed = {n for n, p in wrapped.named_parameters() if not p.equal(kept[n])}
    assert changed
    assert all("lora_" in name for name in changed)


# Compiled, and in another process


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile's
def test_a_step_compiles_as_one_graph():
    kind = "llama"
    blocks = shaken(blocks_of(kind, 4))
    draw = blocks.draw(batch_of(kind), 1, generator=seeded())
    expected = [blocks.loss_at(batch_of(kind), 1, draw).loss, *gradients(blocks, kind, 1, draw)]
    blocks.loss_at = torch.compile(blocks.loss_at, fullgraph=True, backend="aot_eager")
    found = [blocks.loss_at(batch_of(kind), 1, draw).loss, *gradients(blocks, kind, 1, draw)]
    for got, want in zip(found, expected, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch.export itself
@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {"rows": "single"}), ("llama", {"rows": "doubled"}), ("vit", {})],
)
def test_a_prediction_is_exported(kind, options):
    class Predicted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = shaken(blocks_of(kind, **options)).eval()

        def forward(self, z, sigma, **given):
            return self.blocks(z, sigma, block=0, **given)

    model, z = Predicted(), normal(3, 8, 16) if kind == "llama" else normal(3, 16)
    given = {k: v for k, v in batch_of(kind).items() if k != "labels"}
    sigma = torch.full((3,), 5.0)
    program = torch.export.export(model, (z, sigma), kwargs=given)
    assert program.module()(z, sigma, **given).equal(model(z, sigma, **given))


@pytest.mark.slow
def test_a_pickle_is_read_where_nothing_was_converted(tmp_path):
    blocks = shaken(blocks_of("llama"))
    expected = blocks.loss(batch_of("llama"), 1, generator=seeded()).loss
    torch.save((blocks, batch_of("llama")), tmp_path / "blocks.pt")
    code = (
        "import torch; from hub_tools import stub_torchvision; stub_torchvision(); "
        f"blocks, batch = torch.load({str(tmp_path / 'blocks.pt')!r}, weights_only=False); "
        "print(blocks.loss(batch, 1, generator=torch.Generator().manual_seed(0)).loss.item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True,
        env={"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == expected.item()
