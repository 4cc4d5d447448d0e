import copy

import pytest
import torch
import torch.nn.functional as nnf
from torch.optim.swa_utils import AveragedModel

from dblocks.blocks import BlocksConfig, DiffusionBlocks, make_optimizers, train_step
from dblocks.models.vit import ViT, ViTConfig, classify
from dblocks.nn import LabelEmbedding
from dblocks.sampling import initial_noise, product_logits, sample_logits
from tools import DEVICE, randomized, seeded

KINDS = ("dit", "official", "none")
SIZES = {
    "image_size": 8,
    "channels": 1,
    "patch_size": 4,
    "width": 24,
    "depth": 6,
    "heads": 2,
    "num_classes": 4,
}


def vit_of(**options):
    torch.manual_seed(0)
    return ViT(ViTConfig(**{**SIZES, **options})).to(DEVICE)


def easy_batch(n=32, seed=0):
    """Four classes that differ in which quarter of the image is bright."""
    labels = torch.arange(n) % 4
    images = 0.3 * torch.randn(n, 1, 8, 8, generator=seeded(seed))
    for i, label in enumerate(labels.tolist()):
        row, column = divmod(label, 2)
        images[i, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
    return {"images": images.to(DEVICE), "labels": labels.to(DEVICE)}


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=3e-3)


def test_rows_have_the_norm_that_was_asked_for():
    table = LabelEmbedding(5, 16, embed_scale=3.0)
    torch.testing.assert_close(table.rows().norm(dim=-1), torch.full((5,), 3.0))
    labels = torch.tensor([4, 0])
    assert torch.equal(table(labels), table.rows()[labels])
    assert table.bfloat16()(labels).dtype == torch.float32


def test_denoised_is_the_expectation_under_the_logits():
    model = DiffusionBlocks(randomized(vit_of(embed_scale=2.0)), BlocksConfig(3))
    data, z = easy_batch(4), torch.randn(4, 24, generator=seeded()).to(DEVICE)
    sigma = torch.full((4,), 0.3, device=DEVICE)
    logits = model.logits(z, sigma, images=data["images"])
    expected = logits.softmax(-1) @ model.base_model.target.embed(
        {"labels": torch.arange(4, device=DEVICE)}
    )
    torch.testing.assert_close(model(z, sigma, images=data["images"]), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", ["posterior", "learned"])
@pytest.mark.parametrize("noise_scale", [None, 0.1])
def test_the_head_is_its_formula(kind, head, noise_scale):
    vit = randomized(vit_of(conditioning=kind, head=head, noise_scale=noise_scale))
    model = DiffusionBlocks(vit, BlocksConfig(3))
    data, z = easy_batch(4), torch.randn(4, 24, generator=seeded()).to(DEVICE)
    sigma = torch.tensor([0.2, 0.3, 0.4, 0.5], device=DEVICE)
    level = model.config.schedule.level(sigma)
    cond = None if kind == "none" else vit.noise_embedding(level.c_noise)
    patches = vit.embed_condition(data)
    first = level.c_in[:, None] * z
    if noise_scale is not None:
        first = vit.class_token + vit.noise_scale * first
    x = torch.cat([(first + vit.positions[:, 0])[:, None], patches], dim=1)
    for layer in vit.layers[2:4]:
        x = layer(x, cond)
    f = nnf.layer_norm(x, (24,), vit.norm.weight, vit.norm.bias, vit.norm.eps)[:, 0]
    m = level.c_skip[:, None] * z + level.c_out[:, None] * f
    if head == "posterior":
        m = f
    elif kind != "none":
        shift, scale = vit.modulation(cond, 4)
        m = m * (1 + scale) + shift
    expected = vit.classifier(m)
    if head == "posterior":
        expected = expected + z @ vit.target_embedding.rows().T / sigma[:, None] ** 2
    got = model.logits(z, sigma, block=1, images=data["images"])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_end_to_end_trains(kind):
    vit = vit_of(conditioning=kind, depth=3)
    assert torch.equal(vit(easy_batch(3)["images"]), torch.zeros(3, 4, device=DEVICE))
    optimizer = adamw(vit.parameters())
    for step in range(60):
        data = easy_batch(seed=step)
        optimizer.zero_grad()
        nnf.cross_entropy(vit(data["images"]), data["labels"]).backward()
        optimizer.step()
    data = easy_batch(64, seed=1000)
    loss = nnf.cross_entropy(vit(data["images"]), data["labels"])
    assert loss < 1.0  # log 4 = 1.39 at the start


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_train_and_classify(kind):
    vit = vit_of(conditioning=kind, depth=3)
    model = DiffusionBlocks(vit, BlocksConfig(3))
    optimizers = make_optimizers(model, adamw)
    generator = seeded()
    for step in range(200):
        train_step(
            model, easy_batch(seed=step), optimizers, generator=generator, clip_grad_norm=1.0
        )
    data = easy_batch(64, seed=1000)
    for b in range(3):
        losses = model.loss(data, b, generator=seeded(b)).losses
        assert losses.mean() < 0.7  # log 4 = 1.39 at the start
    logits = classify(model, data["images"], generator=seeded())
    assert logits.dtype == torch.float32
    assert (logits.argmax(-1) == data["labels"]).float().mean() > 0.7  # chance is 0.25


@pytest.mark.parametrize("noise", ["none", "paper", "unit_variance"])
@pytest.mark.parametrize("top_share", [0.0, 0.5])
def test_classify_is_euler(noise, top_share):
    config = BlocksConfig(3, top_share=top_share)
    model = DiffusionBlocks(randomized(vit_of(image_drop=0.1)), config)
    images, schedule = easy_batch(4)["images"], model.config.schedule
    z = torch.zeros(4, 24, device=DEVICE)
    if noise != "none":
        z = initial_noise((4, 24), schedule, noise=noise, generator=seeded()).to(DEVICE)
    given = {"noise": noise, "generator": seeded(), "guidance_scale": 2.0}
    for options, sigmas in (
        ({"num_steps": 3} if top_share else {}, schedule.steps(3)),
        ({"num_steps": 5}, schedule.steps(5)),
        ({"sigmas": [80.0, 0.4, 0.01]}, [80.0, 0.4, 0.01]),
    ):
        got = classify(model, images, **{**given, "generator": seeded()}, **options)
        assert torch.equal(got, sample_logits(model, z, sigmas, images=images, guidance_scale=2.0))


@pytest.mark.parametrize("noise", ["none", "paper"])
def test_by_default_classes_are_those_of_the_product(noise):
    model = DiffusionBlocks(randomized(vit_of()), BlocksConfig(3))
    images, top = easy_batch(4)["images"], torch.tensor(80.0, device=DEVICE)
    z = torch.zeros(4, 24, device=DEVICE)
    if noise == "paper":
        z = initial_noise((4, 24), model.config.schedule, generator=seeded()).to(DEVICE)
    each = [model.logits(z, top, block=b, images=images).log_softmax(-1) for b in range(3)]
    expected = (sum(each) / 3).log_softmax(-1)
    got = classify(model, images, noise=noise, generator=seeded())
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(4, device=DEVICE))
    torch.testing.assert_close(got, product_logits(model, z, images=images))
    untrained = DiffusionBlocks(vit_of(), BlocksConfig(3, top_share=0.0))
    with pytest.raises(ValueError, match=r"trained at sigma_max, got BlocksConfig\.top_share = 0"):
        product_logits(untrained, z, images=images)
    one = DiffusionBlocks(randomized(vit_of()), BlocksConfig(1, top_share=0.0))
    alone = one.logits(z, top, images=images).log_softmax(-1)
    torch.testing.assert_close(product_logits(one, z, images=images), alone)


def test_dropped_images_leave_the_null_image():
    vit = randomized(vit_of(image_drop=0.5))
    images = easy_batch(4)["images"]
    drop = torch.tensor([True, False, True, False], device=DEVICE)
    tokens = vit.embed_condition({"images": images}, drop)
    null = (vit.null_image + vit.positions[:, 1:])[0]
    assert torch.equal(tokens[0], null)
    assert torch.equal(tokens[2], null)
    kept = vit.embed_condition({"images": images})
    torch.testing.assert_close(tokens[~drop], kept[~drop])
    model = DiffusionBlocks(vit, BlocksConfig(3))
    dropped = torch.stack(
        [model.draw(easy_batch(64), 0, generator=seeded(s)).drop for s in range(9)]
    )
    assert 0.4 < dropped.float().mean() < 0.6


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_and_deepcopy(kind):
    vit = randomized(vit_of(conditioning=kind, image_size=(8, 12), channels=2))
    images = torch.randn(2, 2, 8, 12, generator=seeded()).to(DEVICE)
    fresh = vit_of(conditioning=kind, image_size=(8, 12), channels=2)
    fresh.load_state_dict(vit.state_dict())
    assert torch.equal(fresh(images), vit(images))
    assert torch.equal(copy.deepcopy(vit)(images), vit(images))


def test_the_classical_vit_has_no_modulation():
    plain = vit_of(conditioning="none", noise_scale=None)
    names = [name for name, _ in plain.named_parameters()]
    assert not [name for name in names if "modulation" in name or "noise" in name]
    assert "layers.0.norm1.weight" in names
    assert vit_of(conditioning="official").noise_embedding.fc2.out_features == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 9}, r"image_size must be multiples of patch_size=4, got \(9, 9\)"),
        ({"image_size": (8, 6)}, r"image_size must be multiples of patch_size=4, got \(8, 6\)"),
        ({"depth": 0}, "depth must be positive, got 0"),
        ({"mlp_ratio": 0}, "mlp_ratio must leave the MLP a finite width of at least 1, got 0"),
        ({"image_drop": 1.0}, r"image_drop must be in \[0, 1\), got 1.0"),
        ({"gate_init": -1.0}, r"gate_init must be a finite number >= 0, got -1.0"),
        ({"heads": 5}, "width must be a multiple of heads, got 24 and 5"),
        ({"conditioning": "film"}, "conditioning must be one of .*, got 'film'"),
    ],
)
def test_config_is_checked(values, message):
    with pytest.raises(ValueError, match=message):
        vit_of(**values)


def test_config_json():
    config = ViTConfig(**{**SIZES, "image_size": (8, 12)})
    assert ViTConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="ViTConfig has no field layers; its fields are"):
        ViTConfig.from_json('{"layers": 3}')


def test_inputs_are_checked():
    vit = vit_of()
    with pytest.raises(ValueError, match=r"images must have shape .* = \[N, 1, 8, 8\], got \[2, 3"):
        vit(torch.randn(2, 3, 8, 8, device=DEVICE))
    # On a GPU the values are not looked at.
    model = DiffusionBlocks(vit.cpu(), BlocksConfig(3))
    for label in (4, -1):
        data = {"images": torch.randn(1, 1, 8, 8), "labels": torch.tensor([label])}
        with pytest.raises(ValueError, match=rf"labels must be in 0\.\.3, got {label}\.\.{label}"):
            model.loss(data, 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.ones(4, dtype=torch.uint8)}, TypeError, "int64, got torch.uint8; call"),
        ({"labels": torch.ones(4, dtype=torch.bool)}, TypeError, "labels must be int64, got"),
        ({"labels": torch.ones(4, 1).long()}, ValueError, r"shape \[N\], got \[4, 1\]"),
        ({"labels": torch.ones(3).long()}, ValueError, "got 4 images and 3 labels; pair them"),
        ({"labels": None}, ValueError, r"must hold a tensor 'labels', got the keys \['images', 'l"),
        ({"labels": [1, 2]}, ValueError, "with labels of type list; it is"),
        ({"images": None}, ValueError, "must hold a tensor 'images', got the keys"),
        ({"images": torch.ones(4, 1, 8, 8).byte()}, TypeError, "floating point, got torch.uint8"),
        (
            {"images": torch.ones(4, 1, 8, 8).double()},
            TypeError,
            "must be torch.float32 as the net",
        ),
        ({"images": torch.ones(4, 8, 8)}, ValueError, r"got \[4, 8, 8\]; reshape them"),
    ],
)
def test_batches_are_checked(change, error, message):
    model = DiffusionBlocks(vit_of().cpu(), BlocksConfig(3))
    data = {"images": torch.ones(4, 1, 8, 8), "labels": torch.ones(4).long(), **change}
    with pytest.raises(error, match=message):
        model.loss(data, 0)
    with pytest.raises(ValueError, match=r"must hold a tensor 'images', got the keys \[\]; it is"):
        model(torch.ones(4, 24), 1.0)


def test_an_empty_batch():
    model = DiffusionBlocks(vit_of(), BlocksConfig(3))
    images = torch.empty(0, 1, 8, 8, device=DEVICE)
    assert model.base_model(images).shape == (0, 4)
    assert classify(model, images).shape == (0, 4)


@pytest.mark.parametrize("wrap", [AveragedModel, lambda m: torch.compile(m, backend="eager")])
def test_classify_looks_through_wrappers(wrap):
    model = DiffusionBlocks(randomized(vit_of()), BlocksConfig(3))
    images = easy_batch(4)["images"]
    expected = classify(model, images, generator=seeded())
    assert torch.equal(classify(wrap(model), images, generator=seeded()), expected)


def test_arguments_of_classify_are_checked():
    model = DiffusionBlocks(vit_of(), BlocksConfig(3))
    images = easy_batch(4)["images"]
    with pytest.raises(ValueError, match="number of steps must be a positive integer, got 0"):
        classify(model, images, num_steps=0)
    with pytest.raises(ValueError, match=r"one of num_steps and sigmas .* got num_steps=2 and"):
        classify(model, images, num_steps=2, sigmas=[80.0, 0.1])
    with pytest.raises(TypeError, match="must be the DiffusionBlocks of a ViT, got ViT; a plain"):
        classify(model.base_model, images)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_classify_does_not_synchronise():
    model = DiffusionBlocks(vit_of(image_drop=0.1), BlocksConfig(3))
    images = easy_batch(4)["images"]
    classify(model, images, guidance_scale=2.0)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        logits = classify(model, images, guidance_scale=2.0)
        model(torch.zeros(4, 24, device=DEVICE), 0.3, images=images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert logits.isfinite().all()


def test_end_to_end_compiles_as_one_graph():
    vit = randomized(vit_of())
    images = easy_batch(4)["images"]
    compiled = torch.compile(vit, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), vit(images))
