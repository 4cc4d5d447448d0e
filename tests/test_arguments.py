"""Arguments of a wrong kind: each kind has one check, and nothing that takes it does without."""

import importlib
import inspect
import math
import pkgutil

import dit_tools
import masked_tools
import numpy as np
import pytest
import torch

import dblocks
import lm_tools
from dblocks import BlocksConfig, DiffusionBlocks, MaskSchedule, NoiseSchedule, convert
from dblocks import functional as F
from dblocks.blocks import make_optimizers, train_step
from dblocks.models import ViTConfig
from dblocks.models.dit import generate_images
from dblocks.models.vit import classify
from dblocks.sampling import generate, initial_noise, unmask
from dblocks.sampling import likelihood as nll
from dblocks.sampling.masked_likelihood import bound_terms
from dblocks.sampling.text import stream
from dblocks.schedules.random import draw_device, draw_seed, uniforms
from tools import batch, seeded, vit

pytestmark = pytest.mark.usefixtures("one_thread")


def blocks_of_vit(**options):
    return DiffusionBlocks(vit(), BlocksConfig(3, **options))


# Generators: nothing is drawn but through draw_seed and draw_device, which check

SKIPPED = ("kernels", "integrations", "__main__", "_C", "recipes", "testing")
INTERFACES = {"Schedule.sample", "NextTokenNetwork.next_token_logits"}
INTERFACES |= {"LanguageModel.next_token_logits", "Residency.visit", "Visits.visit"}
TAKERS = {
    "train_step": lambda g: train_step(
        m := blocks_of_vit(), batch(), make_optimizers(m, lm_tools.adamw), generator=g
    ),
    "Denoiser.loss": lambda g: blocks_of_vit().loss(batch(), 0, generator=g),
    "Denoiser.draw": lambda g: blocks_of_vit().draw(batch(), 0, generator=g),
    "EDMSchedule.sample": lambda g: NoiseSchedule().sample(0, 3, (2,), generator=g),
    "MaskSchedule.sample": lambda g: MaskSchedule().sample(0, 3, (2,), generator=g),
    "with_top": lambda g: NoiseSchedule().sample(0, 3, (2,), top_share=0.5, generator=g),
    "draw_seed": draw_seed,
    "draw_device": draw_device,
    "initial_noise": lambda g: initial_noise((2,), NoiseSchedule(), generator=g, device="cpu"),
    "classify": lambda g: classify(blocks_of_vit(), batch()["images"], generator=g),
    "generate_images": lambda g: generate_images(
        dit_tools.blocks_of(), dit_tools.some_labels(), num_steps=3, generator=g
    ),
    "generate": lambda g: generate(lm_tools.blocks_of(), [[1]], max_new_tokens=1, generator=g),
    "stream": lambda g: stream(
        lm_tools.blocks_of(), [[1]], max_new_tokens=1, generator=g
    ),
    "unmask": lambda g: unmask(masked_tools.blocks_of(), torch.full((1, 4), -1), generator=g),
    "next_token_nll": lambda g: nll.next_token_nll(
        lm_tools.lm_of(), lm_tools.tokens_of(), generator=g
    ),
    "product_nll": lambda g: nll.product_nll(
        DiffusionBlocks(lm_tools.lm_of(), BlocksConfig(3, top_share=0.5)),
        lm_tools.tokens_of(), generator=g,
    ),
    "denoising_bound": lambda g: nll.denoising_bound(
        lm_tools.blocks_of(), lm_tools.tokens_of(), generator=g
    ),
    "RecurrentLM.forward": lambda g: lm_tools.recurrent_of()(lm_tools.tokens_of(), generator=g),
    "RecurrentLM.next_token_loss": lambda g: lm_tools.recurrent_of().next_token_loss(
        {"tokens": lm_tools.tokens_of()}, num_recurrences=2, generator=g
    ),
    "RecurrentLM.draw_recurrences": lambda g: lm_tools.recurrent_of().draw_recurrences(g),
    "RecurrentLM.next_token_logits": lambda g: lm_tools.recurrent_of().next_token_logits(
        lm_tools.tokens_of(), num_steps=2, generator=g
    ),
    "CausalLM.next_token_logits": lambda g: lm_tools.lm_of().next_token_logits(
        lm_tools.tokens_of(), generator=g
    ),
}  # fmt: skip


def functions_of(module):
    """The public functions and methods that a module defines, by their names."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", "") != module.__name__:
            continue
        if inspect.isfunction(value):
            yield name, value
        methods = vars(value).items() if inspect.isclass(value) else ()
        yield from ((f"{name}.{k}", f) for k, f in methods if inspect.isfunction(f) and k[0] != "_")


def test_every_function_that_takes_a_generator_is_tried():
    found = set()
    for info in pkgutil.walk_packages(dblocks.__path__, "dblocks."):
        if info.name.split(".")[1] in SKIPPED:
            continue
        functions = functions_of(importlib.import_module(info.name))
        found |= {n for n, f in functions if "generator" in inspect.signature(f).parameters}
    assert found - INTERFACES - {"check_generator"} == set(TAKERS)


@pytest.mark.parametrize("generator", [5, "cpu"])
@pytest.mark.parametrize("name", TAKERS)
def test_generators_are_checked(name, generator):
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator or None, got "):
        TAKERS[name](generator)


# Configs and schedules


@pytest.mark.parametrize("config", [3, None, {"num_blocks": 3}, BlocksConfig, NoiseSchedule()])
@pytest.mark.parametrize("make", [DiffusionBlocks, lambda m, c: convert(m, c, task="classes")])
def test_a_config_is_a_blocks_config(make, config):
    with pytest.raises(TypeError, match=r"config must be a BlocksConfig, got .*; BlocksConfig\(3"):
        make(vit(), config)


@pytest.mark.parametrize("schedule", [None, "edm", 80.0, NoiseSchedule, BlocksConfig(2)])
def test_a_schedule_is_a_schedule(schedule):
    with pytest.raises(TypeError, match=r"schedule must be a schedule, such as dblocks\.Noise"):
        BlocksConfig(3, schedule=schedule)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoiseSchedule(sigma_max="80"), "sigma_max of NoiseSchedule must be float, got '8"),
        (lambda: NoiseSchedule(partition=None), "partition of NoiseSchedule must be one of"),
        (lambda: NoiseSchedule(p_mean=[1.0]), "p_mean of NoiseSchedule must be float, got"),
        (lambda: MaskSchedule(kind=3), "kind of MaskSchedule must be one of"),
        (lambda: BlocksConfig("3"), "num_blocks of BlocksConfig must be int, got '3' of type str"),
        (lambda: BlocksConfig(2, layers_per_block=3), "layers_per_block of BlocksConfig must be"),
        (lambda: BlocksConfig(2, overlap=None), "overlap of BlocksConfig must be float, got None"),
        (lambda: BlocksConfig(2, shared=True), "shared of BlocksConfig must be one of"),
        (lambda: ViTConfig(width="24"), "width of ViTConfig must be int, got '24' of type str"),
        (lambda: ViTConfig(image_size=None), "image_size of ViTConfig must be"),
    ],
)
def test_fields_of_configs_are_of_their_types(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_numbers_of_other_libraries_become_plain_ones():
    config = BlocksConfig(
        np.int64(2), layers_per_block=[np.int32(4), 2], overlap=np.float32(0.25),
        schedule=NoiseSchedule(sigma_max=np.float64(40), partition=(np.float32(0.5),)),
    )  # fmt: skip
    assert BlocksConfig.from_json(config.to_json()) == config
    assert (config.num_blocks, config.layers_per_block, config.overlap) == (2, (4, 2), 0.25)
    assert type(config.overlap) is float
    assert type(ViTConfig(width=np.int64(24), heads=2).width) is int


# Numbers of schedules


@pytest.mark.parametrize("name", ["sigma_min", "sigma_max", "sigma_data"])
@pytest.mark.parametrize("value", [1e308, 1e20, 1e-20, 5e-324])
def test_levels_are_those_whose_squares_are_float32_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} must|sigma_max must be greater"):
        NoiseSchedule(**{name: value})


@pytest.mark.parametrize("sigma_data", [1e-18, 0.5, 1e18])
def test_the_whole_range_of_levels_has_finite_coefficients(sigma_data):
    schedule = NoiseSchedule(sigma_min=1e-18, sigma_max=1e18, p_std=30.0, sigma_data=sigma_data)
    levels = torch.cat([schedule.steps(5, kind) for kind in ("equal_mass", "karras")]).float()
    level = schedule.level(levels)
    numbers = [*(getattr(level, name) for name in level._fields[:-1]), schedule.loss_weight(levels)]
    assert all(number.isfinite().all() for number in numbers)
    assert schedule.sample(1, 3, (9,), overlap=1e9).isfinite().all()
    assert initial_noise((2, 3), schedule, noise="unit_variance").isfinite().all()


@pytest.mark.parametrize("schedule", [NoiseSchedule(), NoiseSchedule(partition="uniform_log")])
@pytest.mark.parametrize("overlap", [1e3, 1e9, 1e308])
def test_a_wide_overlap_is_the_whole_range(schedule, overlap):
    assert schedule.range_of(1, 3, overlap=overlap) == (0.002, 80.0)
    config = BlocksConfig(3, schedule=schedule, overlap=overlap)
    draw = DiffusionBlocks(vit(), config).draw(batch(), 2, generator=seeded())
    assert draw.sigma.min() >= 0.002
    assert draw.sigma.max() <= 80


def test_a_wide_overlap_of_masks_is_the_whole_range():
    assert MaskSchedule().range_of(1, 3, overlap=1e9) == (0.0, 1.0)


@pytest.mark.parametrize("rho", [1e-3, 0.5, 7.0, 100.0, 1e9, 1e17, 1e300])
def test_karras_steps_for_any_rho(rho):
    n, grid = 7, NoiseSchedule().steps(7, "karras", rho=rho)
    assert (grid[0].item(), grid[-1].item()) == (80.0, 0.002)
    assert (grid.diff() < 0).all()
    if rho <= 100:  # the formula of the paper, in enough digits
        mpmath = pytest.importorskip("mpmath")
        with mpmath.workdps(6000):
            a, b = (mpmath.mpf(x) ** (1 / mpmath.mpf(rho)) for x in (80.0, 0.002))
            expected = [float((a + mpmath.mpf(i) / (n - 1) * (b - a)) ** rho) for i in range(n)]
    else:  # its limit is even in ln sigma
        expected = [80 * (0.002 / 80) ** (i / (n - 1)) for i in range(n)]
    torch.testing.assert_close(
        grid,
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-7 if rho == 1e9 else 1e-13,
        atol=0,
    )


# Seeds

SEEDS = (np.int64(7), np.uint8(7), np.array(7, dtype=np.int32))


def noised(seed, impl):
    return F.noise_inject(torch.ones(2, 5), torch.ones(2), seed, impl=impl).z


def edm(seed, impl):
    return F.edm_loss(torch.ones(2, 5), torch.ones(2, 5), torch.ones(2), seed, impl=impl)


@pytest.mark.parametrize("seed", SEEDS, ids=["int64", "uint8", "0-d array"])
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("call", [noised, edm, lambda seed, impl: uniforms((9,), seed)])
def test_integers_of_other_libraries_are_seeds(call, impl, seed):
    assert torch.equal(call(seed, impl), call(7, impl))


def test_an_integer_of_another_library_is_a_seed_of_masks():
    model, tokens = masked_tools.blocks_of(), masked_tools.tokens_of()
    first, second = (bound_terms(model, tokens, seed=s).nats for s in (3, np.uint16(3)))
    assert torch.equal(first, second)


@pytest.mark.parametrize("seed", [1.0, "7", None, True, np.float32(7), np.array([7])])
@pytest.mark.parametrize("call", [noised, edm, lambda seed, impl: uniforms((9,), seed)])
def test_other_things_are_no_seeds(call, seed):
    with pytest.raises(TypeError, match="seed must be an int or a 0-d int64 tensor, got"):
        call(seed, "auto")


@pytest.mark.parametrize("sigma_data", [math.inf, math.nan, 0.0])
def test_sigma_data_of_ops_is_finite(sigma_data):
    with pytest.raises(ValueError, match="sigma_data must be a number from"):
        F.noise_inject(torch.ones(2, 5), torch.ones(2), 7, sigma_data=sigma_data)


# Batches to train on

NO_TOKENS = {"tokens": torch.zeros(0, 4, dtype=torch.int64)}


def some(values):
    return {key: value[:0] for key, value in values.items()}


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (blocks_of_vit, some(batch())),
        (dit_tools.blocks_of, some(dit_tools.batch_of())),
        (lm_tools.blocks_of, NO_TOKENS),
        (lambda: lm_tools.blocks_of(rows="single", head="posterior"), NO_TOKENS),
        (lm_tools.recurrent_blocks_of, NO_TOKENS),
        (masked_tools.blocks_of, NO_TOKENS),
    ],
    ids=["classes", "images", "tokens", "single", "recurrent", "masked"],
)
def test_an_empty_batch_is_refused(make, data):
    model = make()
    with pytest.raises(ValueError, match=r"must hold at least one sample, got the shapes \{"):
        model.loss(data, 0)
    with pytest.raises(ValueError, match="must hold at least one sample"):
        train_step(model, data, make_optimizers(model, lm_tools.adamw))


@pytest.mark.parametrize("network", [lm_tools.lm_of, lm_tools.recurrent_of])
def test_an_empty_batch_is_refused_end_to_end(network):
    with pytest.raises(ValueError, match="must hold at least one sample"):
        network().next_token_loss(NO_TOKENS)
