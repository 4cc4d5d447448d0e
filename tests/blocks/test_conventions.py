"""What people use around a network works around one in blocks, unchanged."""

import copy
import io
import pickle
from functools import partial

import dit_tools
import pytest
import torch
from hub_tools import library, reset_accelerate
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import lm_tools
from dblocks import BlocksConfig, DiffusionBlocks, make_optimizers, train_step
from dblocks.blocks import unwrapped
from dblocks.blocks.memory import SavedActivations
from dblocks.models.dit import generate_images
from dblocks.models.vit import classify
from dblocks.sampling import generate
from tools import DEVICE, batch, randomized, seeded, vit

NETWORKS = ("vit", "dit", "causal_lm")
FORWARD = {"vit": "forward", "dit": "forward", "causal_lm": "doubled"}

pytestmark = pytest.mark.usefixtures("one_thread")


def blocks_of(kind, **options):
    torch.manual_seed(0)
    if kind == "vit":
        return DiffusionBlocks(randomized(vit()), BlocksConfig(3, **options))
    if kind == "dit":
        return DiffusionBlocks(randomized(dit_tools.dit_of()), BlocksConfig(3, **options))
    return DiffusionBlocks(randomized(lm_tools.lm_of()), BlocksConfig(3, **options))


def batch_of(kind):
    if kind == "vit":
        return batch()
    return dit_tools.batch_of() if kind == "dit" else {"tokens": lm_tools.tokens_of()}


def sample(kind, model):
    """What the network is for, from a fixed seed."""
    if kind == "vit":
        return classify(model, batch()["images"], generator=seeded())
    if kind == "dit":
        return generate_images(model, dit_tools.some_labels(), num_steps=4, generator=seeded())
    return torch.stack(generate(model, [[1, 2]], max_new_tokens=4, generator=seeded()))


@torch.no_grad()
def answers(kind, model):
    """A sample, and the loss of each block."""
    blocks, data = unwrapped(model), batch_of(kind)
    return [sample(kind, model), *(blocks.loss(data, b, generator=seeded()).loss for b in range(3))]


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


def trained(block):
    return [p for p in block.parameters() if p.requires_grad]


def gradients(loss, parameters):
    return torch.autograd.grad(loss, parameters, allow_unused=True)


def same(first, second):
    """Whether two lists of tensors are equal bit for bit; tensors may be None."""
    return len(first) == len(second) and all(
        a is b or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(first, second, strict=True)
    )


@pytest.fixture
def accelerate():
    yield library("accelerate")
    reset_accelerate()


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_trains_one_block(kind, precision, accelerate):
    data, model = batch_of(kind), blocks_of(kind)
    by_hand = copy.deepcopy(model)
    accelerator = accelerate.Accelerator(cpu=DEVICE.type == "cpu", mixed_precision=precision)
    others = [p.clone() for b in (0, 2) for p in model.block_parameters(b)]

    block = model.block(1)
    prepared, optimizer = accelerator.prepare(block, adamw(trained(block)))
    generator = seeded()
    for _ in range(3):
        with accelerator.autocast():
            loss = accelerator.unwrap_model(prepared).loss(data, generator=generator).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained(block), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert accelerator.unwrap_model(prepared) is block
    assert same(others, [p for b in (0, 2) for p in model.block_parameters(b)])

    block = by_hand.block(1)
    optimizer, generator = adamw(trained(block)), seeded()
    for _ in range(3):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = block.loss(data, generator=generator).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained(block), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert same(list(model.parameters()), list(by_hand.parameters()))
    assert not same(list(model.parameters()), list(blocks_of(kind).parameters()))


@pytest.mark.parametrize("kind", NETWORKS)
def test_an_average_of_the_weights_is_sampled(kind):
    decay, model, data = 0.5, blocks_of(kind), batch_of(kind)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    expected = None
    optimizers = make_optimizers(model, adamw)
    for step in range(4):
        train_step(model, data, optimizers, generator=seeded(step))
        average.update_parameters(model)
        now = [p.detach().clone() for p in model.parameters()]
        if expected is None:
            expected = now
        else:
            pairs = zip(expected, now, strict=True)
            expected = [decay * old + (1 - decay) * new for old, new in pairs]
    for got, want in zip(average.module.parameters(), expected, strict=True):
        torch.testing.assert_close(got, want)
    by_hand = blocks_of(kind)
    by_hand.load_state_dict(average.module.state_dict())
    assert same(answers(kind, average), answers(kind, by_hand))
    assert not same(list(average.module.parameters()), list(model.parameters()))


@pytest.mark.parametrize("kind", NETWORKS)
def test_autocast_trains_in_bfloat16_and_keeps_float32_weights(kind):
    model, data = blocks_of(kind), batch_of(kind)
    optimizers = make_optimizers(model, adamw)
    exact = model.loss(data, 1, generator=seeded()).loss
    with torch.autocast(DEVICE.type, torch.bfloat16):
        result = train_step(model, data, optimizers, block=1, generator=seeded())
        sample(kind, model)
    torch.testing.assert_close(result.loss, exact, rtol=0.1, atol=0.1)
    assert not torch.equal(result.loss, exact)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", NETWORKS)
def test_gradient_checkpointing_of_a_blocks_layers(kind):
    model, data = blocks_of(kind), batch_of(kind)
    model.train()
    block = model.block(1)
    draw = block.draw(data, 1, generator=seeded())
    parameters = trained(block)

    def step():
        with SavedActivations(parameters) as saved:
            loss = block.loss_at(data, 1, draw).loss
        return saved.bytes, gradients(loss, parameters)

    whole, expected = step()
    for layer in block.base_model.layers.values():
        run = getattr(layer, FORWARD[kind])
        setattr(layer, FORWARD[kind], partial(checkpoint, run, use_reentrant=False))
    less, got = step()
    assert less < 0.7 * whole
    assert same(got, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile's
def test_a_block_of_compiled_layers_trains_alike():
    model, data = dit_tools.blocks_of(depth=3), batch_of("dit")
    block = model.block(1)
    draw = block.draw(data, 1, generator=seeded())

    def step():
        loss = block.loss_at(data, 1, draw).loss
        return [loss, *(g for g in gradients(loss, trained(block)) if g is not None)]

    expected = step()
    for layer in block.base_model.layers.values():
        layer.compile(fullgraph=True)
    for got, want in zip(step(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("shared", ["train", "private"])
def test_copies_and_pickles(kind, shared):
    model, data = blocks_of(kind, shared=shared), batch_of(kind)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = blocks_of(kind, shared=shared)
    for p in fresh.parameters():
        torch.nn.init.ones_(p)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    unpickled = blocks_of(kind, shared=shared)
    unpickled.load_state_dict(pickle.loads(pickle.dumps(model.state_dict())))
    twins = [copy.deepcopy(model), fresh, unpickled, pickle.loads(pickle.dumps(model))]
    expected = answers(kind, model)
    for twin in twins:
        assert same(answers(kind, twin), expected)
        ours = {p.data_ptr() for p in model.parameters()}
        assert not ours & {p.data_ptr() for p in twin.parameters()}
    train_step(twins[0], data, make_optimizers(twins[0], adamw), generator=seeded())
    assert same(answers(kind, model), expected)


@pytest.mark.parametrize("kind", NETWORKS)
def test_adapters_of_peft_train_one_block(kind, tmp_path):
    peft = library("peft")
    model, data = blocks_of(kind), batch_of(kind)
    before = {name: p.clone() for name, p in model.named_parameters()}
    expected = answers(kind, model)
    config = peft.LoraConfig(r=2, target_modules=r".*\.layers\..*\.(qkv|out|fc1|fc2)")
    block = peft.get_peft_model(model.block(1), config)
    names = [name for name, p in block.named_parameters() if p.requires_grad]
    assert names
    assert all("lora_" in name and ".layers." in name for name in names)
    assert same(answers(kind, model), expected)  # the adapters start at zero

    optimizer, generator = adamw(trained(block)), seeded()
    for _ in range(3):
        block.loss(data, generator=generator).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    assert same(list(before.values()), [kept[name] for name in before])
    adapted = answers(kind, model)
    changed = [not torch.equal(a, b) for a, b in zip(adapted, expected, strict=True)]
    assert changed[1:] == [False, True, False]

    block.save_pretrained(tmp_path)
    fresh = blocks_of(kind)
    loaded = peft.PeftModel.from_pretrained(fresh.block(1), tmp_path)
    assert same(answers(kind, fresh), adapted)
    loaded.merge_and_unload()
    assert [name for name, _ in fresh.named_parameters()] == list(before)
    for got, want in zip(answers(kind, fresh)[1:], adapted[1:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
