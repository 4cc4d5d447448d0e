"""Layers of other libraries' models with a modulation: their own function, and a plain formula."""

import copy

import convert_tools
import pytest
import torch
from convert_tools import CAUSAL, CONDITIONED, MASKED, batch_of, blocks_of, model_of, shaken
from torch import nn

from dblocks.blocks.memory import SavedActivations
from dblocks.integrations.convert.conditioned import check_form, probe
from dblocks.integrations.convert.find import find_layers
from dblocks.integrations.convert.forms import form_of
from dblocks.integrations.convert.layers import ConditionedLayer
from dblocks.integrations.norms import norm_spec
from dblocks.testing import assert_within_budget
from tools import normal, seeded

pytestmark = pytest.mark.usefixtures("one_thread")
FORMED = ("llama", "gpt2", "bert", "vit", "timm-pooled")


def as_dtype(batch, dtype):
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def own_rows(kind, model, batch):
    """What the model's last layer returns."""
    caught = []
    *_, last = find_layers(model).values()
    handle = last.register_forward_hook(lambda *args: caught.append(args[-1]))
    if "images" in batch:
        model(batch["images"])
    else:
        model(input_ids=batch["tokens"])
    handle.remove()
    return caught[0] if isinstance(caught[0], torch.Tensor) else caught[0][0]


def our_rows(kind, blocks, batch):
    """The same, of all layers as they are run on the noise: clean rows where there are such."""
    network, schedule = blocks.base_model, blocks.config.schedule
    draw = blocks.draw(batch, 0, generator=seeded())
    level = schedule.level(draw.sigma)
    if kind in MASKED:
        return network.run_layers(
            network.layers, batch["tokens"], level, network.embed_condition(batch)
        ).x
    if kind not in CAUSAL:
        with torch.no_grad():
            network.noise_scale.zero_()
        z = torch.zeros(len(batch["labels"]), network.width)
        return network.run_layers(network.layers, z, level, network.embed_condition(batch)).x
    condition = network.embed_condition(batch)
    x = torch.cat([condition.clean, condition.noisy], dim=1)
    cond = network.noise_embedding(level.c_noise)
    for layer in network.layers:
        x = layer(x, cond, condition.attention, clean=cond.shape[1])
    return x[:, : x.shape[1] // 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", CONDITIONED)
def test_without_a_modulation_they_are_the_models_own(kind, dtype):
    runs = {}
    for name, run, of in (
        ("ref64", own_rows, torch.float64),
        ("eager", own_rows, dtype),
        ("got", our_rows, dtype),
    ):
        model, batch = model_of(kind).to(dtype).to(of), as_dtype(batch_of(kind), of)
        torch.manual_seed(0)
        # In doubled rows clean ones run beside noisy ones, which the model does not have.
        form = {"rows": "doubled"} if kind in CAUSAL else {}
        made = blocks_of(kind, model=model, **form) if run is our_rows else model
        rows = run(kind, made, batch)
        weights = normal(*rows.shape, seed=3).to(rows.dtype)
        layers = [p for layer in find_layers(model).values() for p in layer.parameters()]
        runs[name] = [rows, *torch.autograd.grad((rows * weights).sum(), layers, allow_unused=True)]
    names = ["rows", *(n for la in find_layers(model).values() for n, _ in la.named_parameters())]
    for name, got, ref64, eager in zip(
        names, runs["got"], runs["ref64"], runs["eager"], strict=True
    ):
        assert (got is None) == (eager is None), name
        # What is added to all keys changes nothing, so the gradients of its bias are rounding.
        if got is not None and not name.endswith(("key.bias", "k_proj.bias")):
            assert_within_budget(got, ref64.double(), eager, f"{kind}, {name}")


def plainly(layer, form, x, chunks, context):
    """The formula of the module's docstring, by the layer's own modules."""
    shift1, scale1, gate1, shift2, scale2, gate2 = chunks
    part = layer.get_submodule

    def norm(path, x):
        module = part(path)
        if isinstance(module, nn.LayerNorm):
            return module(x)
        # Llama's own rounds to float32, which the reference must not.
        return nn.functional.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)

    def attend(h):
        h = part(form.attention)(h, **context)
        h = h if isinstance(h, torch.Tensor) else h[0]
        for path in form.after_attention:
            h = part(path)(h)
        return h

    def transform(h):
        for path in (form.mlp, *form.after_mlp):
            h = part(path)(h)
        return h

    if form.post_norm:
        x = norm(form.norm1, x + (1 + gate1) * attend(x)) * (1 + scale1) + shift1
        return norm(form.norm2, x + (1 + gate2) * transform(x)) * (1 + scale2) + shift2
    x = x + (1 + gate1) * attend(norm(form.norm1, x) * (1 + scale1) + shift1)
    return x + (1 + gate2) * transform(norm(form.norm2, x) * (1 + scale2) + shift2)


def layer_of(kind, dtype=torch.float32):
    """A layer in which nothing is zero, and what its attention is given."""
    model = model_of(kind)
    layer = copy.deepcopy(next(iter(find_layers(model).values())))
    torch.manual_seed(0)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.2)
    context = {} if kind.startswith(("timm", "vit")) else {"attention_mask": None}
    if kind == "llama":
        turned = model.model.rotary_emb(torch.ones(1, dtype=dtype), torch.arange(8)[None])
        context["position_embeddings"] = tuple(t.to(dtype) for t in turned)
    return layer.to(dtype), context


@pytest.mark.parametrize("segments", [None, 1, 2, 8, "clean", "clean-4"])
@pytest.mark.parametrize("kind", FORMED)
def test_the_modulation_is_the_plain_formula(kind, segments):
    N, T, D = 2, 8, 16
    clean = isinstance(segments, str)
    S = {"clean": 1, "clean-4": 4}.get(segments, segments)
    results = {}
    for name, dtype in (("got", torch.float32), ("eager", torch.float32), ("ref64", torch.float64)):
        layer, context = layer_of(kind, dtype)
        form = form_of(layer)
        ours = ConditionedLayer(layer, D, form).to(dtype)
        nn.init.normal_(ours.modulation.linear.weight, std=0.2)
        ours.modulation.linear.weight.data = normal(6 * D, D, seed=1).to(dtype) * 0.2
        x = normal(N, T, D, seed=2).to(dtype).requires_grad_()
        cond = normal(N, D, seed=3) if S is None else normal(N, S, D, seed=3)
        cond = cond.to(dtype).requires_grad_()
        if name == "got":
            out = ours(x, cond, context, clean=S if clean else 0)
        else:
            rows = (cond[:, None] if S is None else cond).expand(N, S or 1, D)
            rows = rows.repeat_interleave((T // 2 if clean else T) // rows.shape[1], dim=1)
            chunks = ours.modulation(rows, N)
            if clean:
                chunks = [torch.cat([torch.zeros_like(c), c], dim=1) for c in chunks]
            out = plainly(layer, form, x, chunks, context)
        inputs = [x, cond, *ours.parameters()]
        upstream = normal(N, T, D, seed=4).to(dtype)
        results[name] = [out, *torch.autograd.grad(out, inputs, upstream, allow_unused=True)]
    names = ["result", "x", "cond", *dict(ours.named_parameters())]
    runs = (names, *(results[k] for k in ("got", "ref64", "eager")))
    for name, got, ref64, eager in zip(*runs, strict=True):
        assert (got is None) == (eager is None)
        # Those of queries and keys are small differences, in which rounding of any order shows.
        if got is not None and not any(
            part in name for part in ("q_proj", "k_proj", "query", "key")
        ):
            assert_within_budget(got, ref64, eager, f"{kind}, {name}")


@pytest.mark.parametrize("kind", FORMED)
def test_a_checkpoint_keeps_the_rows_only(kind):
    layer, context = layer_of(kind)
    ours = ConditionedLayer(layer, 16, form_of(layer))
    nn.init.normal_(ours.modulation.linear.weight, std=0.2)
    x, cond = normal(2, 8, 16, seed=2).requires_grad_(), normal(2, 8, 16, seed=3)
    found, sizes = [], []
    for checkpointing in (False, True):
        with SavedActivations([*ours.parameters(), x, cond]) as saved:
            out = ours(x, cond, context, checkpointing=checkpointing)
        sizes.append(saved.bytes)
        found.append(torch.autograd.grad(out.sum(), [x, *ours.parameters()], allow_unused=True))
    assert sizes[1] == 0 < sizes[0]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


# Which layers and norms are known


@pytest.mark.parametrize("kind", FORMED)
def test_a_layer_that_computes_something_else_is_refused(kind):
    layer, context = layer_of(kind)
    form, rows = form_of(layer), probe(layer, 16)
    if kind == "llama":
        cos, sin = context["position_embeddings"]
        context["position_embeddings"] = (cos[:, :4], sin[:, :4])
    layer.train()
    check_form(layer, form, rows, context, "layers.0")
    assert all(m.training for m in layer.modules())

    class Halved(type(layer)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            return (out if isinstance(out, torch.Tensor) else out[0]) / 2

    layer.__class__ = Halved
    with pytest.raises(ValueError, match=r"layers\.0 must be a pre-norm .* but Halved computes"):
        check_form(layer, form, rows, context, "layers.0")
    assert all(m.training for m in layer.modules())


def test_one_overridden_layer_among_others_is_found():
    model = model_of("timm")

    class Halved(type(model.blocks[2])):
        def forward(self, x, *args, **kwargs):
            return super().forward(x, *args, **kwargs) / 2

    model.blocks[2].__class__ = Halved
    with pytest.raises(ValueError, match=r"blocks\.2 must be a pre-norm .* but Halved computes"):
        blocks_of("timm", model=model)


def test_norms_of_which_little_is_known_run_themselves():
    class Shifted(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) + 1

    assert norm_spec(Shifted(16), torch.float32) is None
    assert norm_spec(nn.LayerNorm((2, 8)), torch.float32) is None
    assert norm_spec(nn.LayerNorm(16), torch.float32).norm == "layer"
    assert norm_spec(nn.RMSNorm(16, eps=1e-6), torch.float32).norm == "rms"
    model, batch = model_of("timm"), batch_of("timm")
    for block in model.blocks:
        block.norm1 = Shifted(16)
    own = own_rows("timm", model, batch)
    with pytest.warns(
        UserWarning, match=r"not fused: .*Shifted, a subclass of LayerNorm"
    ) as caught:
        blocks = blocks_of("timm", model=model)
    assert len(caught) == 1
    assert caught[0].filename == convert_tools.__file__
    torch.testing.assert_close(our_rows("timm", blocks, batch), own)
    shaken(blocks_of("timm", model=model)).loss(batch, 1).loss.backward()
    assert model.blocks[2].norm1.weight.grad.any()
