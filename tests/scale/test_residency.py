"""One block at a time on a device, here the CPU: the same bits, uses, files and refusals."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dblocks.blocks import BlocksConfig, DiffusionBlocks, make_optimizers, train_step
from dblocks.scale import resident
from dblocks.scale.host import host_buffer
from lm_tools import lm_of, tokens_of
from tools import randomized, seeded

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIMIZERS = {
    "default": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "muon": lambda p: [
        torch.optim.Muon([q for q in p if q.ndim == 2], lr=1e-2),
        torch.optim.AdamW([q for q in p if q.ndim != 2], lr=1e-2),
    ],
}


def made(kind="default", shared="train"):
    model = DiffusionBlocks(randomized(lm_of(depth=3)), BlocksConfig(3, shared=shared))
    return model, make_optimizers(model, OPTIMIZERS[kind])


def batch():
    return {"tokens": tokens_of()}


def steps(model, optimizers, count=8, order=None, generator=None, **options):
    generator, blocks = generator or seeded(3), []
    for i in range(count):
        if order is not None:
            torch.randint(3, (), generator=generator)  # as the draw of a block
        block = None if order is None else order[i]
        result = train_step(model, batch(), optimizers, block=block, generator=generator, **options)
        blocks.append(result.block)
    return blocks


def assert_same(one, other):
    (model, optimizers), (expected, others) = one, other
    found, wanted = model.state_dict(), expected.state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    torch.testing.assert_close(optimizers.state_dict(), others.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("host", ["pinned", "file"])
def test_bits_are_those_without_residency(kind, host, tmp_path):
    one, other = made(kind), made(kind)
    resident(
        *one,
        "cpu",
        steps_per_visit=2,
        prefetch="all",
        host=host,
        folder=tmp_path if host == "file" else None,
    )
    order = steps(*one, clip_grad_norm=1.0)
    assert len(set(order)) == 3
    assert order[::2] == order[1::2]
    steps(*other, order=order, clip_grad_norm=1.0)
    assert_same(one, other)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prefetch", ["none", "parameters", "all"])
@pytest.mark.parametrize("shared", ["train", "frozen", "private"])
def test_one_step_a_visit_is_training_as_it_is(prefetch, shared):
    one, other = made(shared=shared), made(shared=shared)
    resident(*one, "cpu", prefetch=prefetch)
    assert steps(*one) == steps(*other)
    assert_same(one, other)


def test_what_was_trained_before_goes_on_and_close_ends_it():
    one, other = made("fused"), made("fused")
    steps(*other, 9)
    generator = seeded(3)
    steps(*one, 3, generator=generator)
    residency = resident(*one, "cpu", prefetch="all")
    steps(*one, 3, generator=generator)
    residency.close()
    assert one[0].residency is None
    steps(*one, 3, generator=generator)
    assert_same(one, other)
    one[0].double()


def test_accumulation_evaluation_and_averages_on_the_way():
    results = []
    for use in (False, True):
        model, optimizers = made()
        residency = resident(model, optimizers, "cpu", prefetch="all") if use else None
        average = AveragedModel(model, device="cpu")
        generator, losses = seeded(3), []
        for block in (0, 2, 1, 0):
            for k in range(2):
                (model.loss(batch(), block, generator=generator).loss / 2).backward()
                with torch.inference_mode():  # of another block, between the two
                    other = (block + 1 + k) % 3
                    losses.append(model.loss(batch(), other, generator=seeded(5)).loss.item())
            for optimizer in optimizers.of_block(block):
                optimizer.step()
            model.zero_grad()
            average.update_parameters(model)
            steps(model, optimizers, 1, order=[block], generator=generator)
        assert residency is None or residency.traffic[0] > 0
        results.append((losses, average.module.state_dict(), (model, optimizers)))
    (losses, averages, plain), (found, others, trained) = results
    assert found == losses
    assert all(torch.equal(others[name], averages[name]) for name in averages)
    assert_same(trained, plain)


def test_scaled_gradients_in_half_precision_with_checkpointing():
    from functools import partial

    from torch.utils.checkpoint import checkpoint

    results = []
    for use in (False, True):
        # Rows are single: the last layer of doubled rows is not called, and refuses a forward.
        lm = randomized(lm_of(depth=3, rows="single", conditioning="none"))
        model = DiffusionBlocks(lm, BlocksConfig(3))
        optimizers = make_optimizers(model, OPTIMIZERS["momentum"])
        for layer in model.base_model.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if use:
            resident(model, optimizers, "cpu", prefetch="parameters")
        scaler, generator = torch.amp.GradScaler("cpu", init_scale=16.0), seeded(3)
        for block in (0, 1, 0):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model.loss(batch(), block, generator=generator).loss
            scaler.scale(loss).backward()
            for optimizer in optimizers.of_block(block):
                scaler.step(optimizer)
            scaler.update()
            model.zero_grad()
        results.append((model, optimizers))
    assert_same(*results)


def test_states_are_saved_and_loaded_while_resident():
    one, other = made(), made()
    residency = resident(*one, "cpu", steps_per_visit=3, prefetch="all")
    generator = seeded(3)
    steps(*one, 4, generator=generator)
    saved = pickle.loads(
        pickle.dumps((one[0].state_dict(), one[1].state_dict(), residency.state_dict()))
    )
    state = generator.get_state()
    rest = steps(*one, 4, generator=generator)
    again = resident(*other, "cpu", steps_per_visit=3, prefetch="all")
    steps(*other, 1)
    other[0].load_state_dict(saved[0])
    other[1].load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    assert steps(*other, 4, generator=torch.Generator().set_state(state)) == rest
    assert_same(one, other)
    with pytest.raises(ValueError, match="state must be that of 3 blocks and 3 steps a visit"):
        again.load_state_dict({"block": 0, "left": 3})


def test_a_copy_is_an_ordinary_model():
    model, optimizers = made()
    resident(model, optimizers, "cpu")
    steps(model, optimizers, 2)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.residency is None
        expected = model.state_dict()
        assert all(torch.equal(t, expected[name]) for name, t in other.state_dict().items())
        other.double()


def test_frozen_parameters_travel_one_way_unless_they_change():
    model, optimizers = made(shared="frozen")
    for parameter in model.block_parameters(0):
        parameter.requires_grad_(False)
    optimizers = make_optimizers(model, OPTIMIZERS["momentum"])
    residency = resident(model, optimizers, "cpu")
    loss = model.loss(batch(), 0, generator=seeded(0)).loss
    first = next(model.block_parameters(0))
    before = residency.traffic[1]
    residency.release()
    assert residency.traffic[1] == before
    model.loss(batch(), 0, generator=seeded(0))
    with torch.no_grad():
        first.add_(1)
    changed = first.clone()
    residency.release()
    assert residency.traffic[1] == before + first.nbytes
    assert torch.equal(first, changed)
    assert model.loss(batch(), 0, generator=seeded(0)).loss != loss


def test_a_graph_of_a_block_that_left_is_refused():
    model, optimizers = made()
    resident(model, optimizers, "cpu")
    loss = model.loss(batch(), 0, generator=seeded(0)).loss
    model.loss(batch(), 1, generator=seeded(0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_misuse_is_refused_by_name():
    model, optimizers = made()
    with pytest.raises(TypeError, match="model must be a DiffusionBlocks"):
        resident(nn.Linear(2, 2), optimizers, "cpu")
    with pytest.raises(TypeError, match="optimizers must be BlockOptimizers"):
        resident(model, torch.optim.SGD(model.parameters()), "cpu")
    with pytest.raises(ValueError, match="prefetch must be one of"):
        resident(model, optimizers, "cpu", prefetch="some")
    with pytest.raises(ValueError, match="host must be one of"):
        resident(model, optimizers, "cpu", host="disk")
    with pytest.raises(ValueError, match="steps_per_visit must be at least 1"):
        resident(model, optimizers, "cpu", steps_per_visit=0)
    with pytest.raises(TypeError, match="steps_per_visit must be an integer"):
        resident(model, optimizers, "cpu", steps_per_visit=1.5)
    for name in ("foo", "cuda:x", "meta"):
        with pytest.raises(RuntimeError, match=f"the CPU or this machine's .* got .?{name}"):
            resident(model, optimizers, name)
    for name in (3.5, None):
        with pytest.raises(
            TypeError, match=f"device must be a torch.device or its name, got {name}"
        ):
            resident(model, optimizers, name)
    with pytest.raises(RuntimeError, match="device must be the CPU or this machine's"):
        resident(model, optimizers, "meta")
    with pytest.raises(TypeError, match="got LBFGS"):
        resident(model, make_optimizers(model, torch.optim.LBFGS), "cpu")
    with pytest.raises(ValueError, match="optimizer of block 0 must have parameters of block 0"):
        resident(
            model, make_optimizers(model, lambda _: torch.optim.SGD(model.parameters())), "cpu"
        )
    assert model.residency is None
    residency = resident(model, optimizers, "cpu")
    with pytest.raises(RuntimeError, match="must not be resident yet"):
        resident(model, optimizers, "cpu")
    with pytest.raises(RuntimeError, match="must not be moved or converted"):
        model.to(torch.float64)
    with pytest.raises(ValueError, match="must be those passed to resident"):
        train_step(model, batch(), make_optimizers(model, OPTIMIZERS["default"]))
    model.base_model.layers[0].double()
    with pytest.raises(RuntimeError, match="the number, shapes and dtypes of a resident model's"):
        train_step(model, batch(), optimizers, block=0)
    model.base_model.layers[0].float()
    residency.close()


def test_tensors_that_cannot_travel_are_refused():
    model, optimizers = made()
    model.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="in a block or shared by all blocks, got extra"):
        resident(model, optimizers, "cpu")
    del model.extra
    one, other = list(model.block_parameters(1))[:2]
    before = one.data
    one.data = other.data
    with pytest.raises(ValueError, match="must not share memory"):
        resident(model, optimizers, "cpu")
    one.data = before
    resident(model, optimizers, "cpu")
    name, parameter = next(iter(model.base_model.layers[0].named_parameters()))
    owner, _, key = name.rpartition(".")
    module = model.base_model.layers[0].get_submodule(owner)
    module._parameters[key] = nn.Parameter(parameter.detach().clone())
    with pytest.raises(RuntimeError, match="must keep its parameters, got another one"):
        train_step(model, batch(), optimizers, block=0)


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        host_buffer(8, "file", torch.device("cpu"), tmp_path / "none")
