"""Mixtures of experts in bfloat16, with the experts held that the plain model chose.

Rounding chooses other experts for some rows, and then the outputs are those of other networks; so
the exact model, the plain one and the converted one are compared where all choose alike.
"""

import copy

import pytest
import torch
from family_models import CAUSAL, T, V, causal_model, clean_logits
from torch.utils._python_dispatch import TorchDispatchMode

from dblocks import BlocksConfig
from dblocks.integrations.convert import convert
from dblocks.testing import assert_within_budget
from tools import seeded

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:not fused"),  # norms of a class of their own
]
N = 12  # the largest of the plain model's roundings, of which a budget is made, needs many rows
TOKENS = torch.randint(3, V, (N, T), generator=seeded(4))
FEW = ("num_experts_per_tok", "moe_k", "moe_topk")
QUICK = ("deepseek_v3", "mixtral")
KINDS = sorted(
    kind
    for kind, given in CAUSAL.items()
    if kind in ("gpt_oss", "phimoe") or (kind != "youtu" and any(n in given for n in FEW))
)


class Choices(TorchDispatchMode):
    """Keeps what `topk` and `max` choose; or, given what was kept, chooses that.

    Args:
        held: the places chosen by each call, for the N*T tokens in order.
    """

    def __init__(self, held=None):
        super().__init__()
        self.held, self.made, self.changed = held, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func not in (torch.ops.aten.topk.default, torch.ops.aten.max.dim):
            return out
        if args[0].ndim == 4:
            return out  # the largest scores of an attention
        dim = args[1] if func is torch.ops.aten.max.dim else -1
        index = out[1]
        if self.held is None:
            self.made.append(index)
            return out
        if len(self.made) == len(self.held):
            return out
        held = self.held[len(self.made)].reshape(N, T, -1)
        rows, left = divmod(index.numel(), N * held.shape[2])
        if left or rows not in (T - 1, T, 2 * T):
            return out  # of the small batch with which a model is tried
        # Of doubled rows, the noisy ones choose for themselves.
        held, own = held[:, :rows], index.reshape(N, rows, -1)
        chosen = torch.cat([held, own[:, held.shape[1] :]], dim=1)
        self.changed += int((chosen.sort(-1).values != own.sort(-1).values).any(-1).sum())
        self.made.append(chosen)
        chosen = chosen.reshape(index.shape)
        return args[0].gather(dim, chosen), chosen


def own_logits(model):
    return model(input_ids=TOKENS, use_cache=False).logits


def under(choices, call):
    """What a call returns with the choices, all of which it makes."""
    mode = Choices(choices)
    with torch.no_grad(), mode:
        found = call()
    assert len(mode.made) == len(choices)
    return found, mode.changed


@pytest.mark.parametrize(
    "kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.long) for k in KINDS]
)
def test_bfloat16_with_few_experts(kind):
    # PhiMoE also leaves out logits below a threshold, which this puts out of reach.
    options = {"router_jitter_noise": 10.0} if kind == "phimoe" else {}
    model = causal_model(kind, **options).bfloat16()
    chosen = Choices()
    with torch.no_grad(), chosen:
        eager = own_logits(model)
    assert chosen.made
    # The product of experts takes no float64; what float32 rounds is 2^-16 of this.
    wide = copy.deepcopy(model).float()
    exact, _ = under(chosen.made, lambda: own_logits(wide))
    again, changed = under(chosen.made, lambda: own_logits(model))
    assert again.equal(eager)
    assert (eager.float() - exact).abs().max() < 0.1 * exact.abs().max()  # a budget that says much
    assert changed == 0
    for rows in ("single", "doubled"):
        ours = copy.deepcopy(model)
        found, _ = under(chosen.made, lambda m=ours, rows=rows: clean_logits(m, TOKENS, rows))
        last = found.shape[1]
        assert_within_budget(
            found.bfloat16(), exact[:, :last].double(), eager[:, :last].contiguous(), rows
        )


# The comparison at conversion


@pytest.mark.parametrize(
    ("kind", "rows", "seed"),
    [("deepseek_v3", "single", 100), ("gpt_oss", "doubled", 101), ("hunyuan_v1_moe", "single", 103),
     ("phimoe", "doubled", 101)],
)  # fmt: skip
def test_none_is_refused_for_another_choice(kind, rows, seed):
    model, generator = causal_model(kind), seeded(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    assert converted(model.bfloat16(), rows).base_model.whole_checked


@pytest.mark.parametrize("rows", ["single", "doubled"])
@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("fault", ["scaled expert", "no gate", "other gate"])
def test_another_mixture_is_refused(kind, rows, fault):
    model = causal_model(kind).bfloat16()
    changed = (
        [m.experts.down_proj for m in model.modules() if hasattr(m, "experts")]
        if fault == "scaled expert"
        else [p for n, p in model.named_parameters() if n.endswith("gate.weight")]
    )
    assert changed

    class Other(type(model)):
        def forward(self, *args, **kwargs):
            kept = [p.detach().clone() for p in changed]
            for p in changed:
                p.data.mul_({"scaled expert": 2, "no gate": 0, "other gate": -1}[fault])
            try:
                return super().forward(*args, **kwargs)
            finally:
                for p, own in zip(changed, kept, strict=True):
                    p.data.copy_(own)

    converted(model, rows)
    model.__class__ = Other
    with pytest.raises(ValueError, match="Other must compute what its embedding"):
        converted(model, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ["single", "doubled"])
def test_another_choice_alone_is_refused(rows, dtype):
    """A bias of the choice has no part in the weights of the experts."""
    model = causal_model("deepseek_v3").to(dtype)
    biases = [b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]
    assert biases

    class Other(type(model)):
        def forward(self, *args, **kwargs):
            kept = [b.clone() for b in biases]
            for bias in biases:
                bias += 5 * torch.arange(len(bias)).flip(0)
            try:
                return super().forward(*args, **kwargs)
            finally:
                for bias, own in zip(biases, kept, strict=True):
                    bias.copy_(own)

    model.__class__ = Other
    with pytest.raises(ValueError, match="Other must compute what its embedding"):
        converted(model, rows)


def test_one_expert_of_another_router_is_refused():
    model = causal_model("mixtral", num_experts_per_tok=1)
    gates = [p for n, p in model.named_parameters() if n.endswith("gate.weight")]

    class Other(type(model)):
        def forward(self, *args, **kwargs):
            for gate in gates:
                gate.data.neg_()
            try:
                return super().forward(*args, **kwargs)
            finally:
                for gate in gates:
                    gate.data.neg_()

    model.__class__ = Other
    with pytest.raises(ValueError, match="Other must compute what its embedding"):
        converted(model, "single")


CHOSEN = {
    "above": lambda h, other: (h > (0.05 if other else 0.0)).to(h.dtype),
    "where above": lambda h, other: torch.where(h > (0.05 if other else 0.0), h, 0 * h),
    "largest": lambda h, other: torch.zeros_like(h).scatter(
        -1, h.topk(8, largest=not other).indices, 1.0
    ),
}


@pytest.mark.parametrize("choose", CHOSEN)
def test_other_choices_of_other_layers_are_refused(choose):
    model = causal_model("llama")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=seeded(3)))
    mlp = type(model.model.layers[0].mlp)

    class Sparse(mlp):
        other = False

        def forward(self, x):
            h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
            return self.down_proj(CHOSEN[choose](h, Sparse.other))

    class Other(type(model)):
        def forward(self, *args, **kwargs):
            Sparse.other = True
            try:
                return super().forward(*args, **kwargs)
            finally:
                Sparse.other = False

    for layer in model.model.layers:
        layer.mlp.__class__ = Sparse
    model.__class__ = Other
    with pytest.raises(ValueError, match="Other must compute what its embedding"):
        converted(model, "single")


def converted(model, rows):
    return convert(model, BlocksConfig(2), task="tokens", rows=rows)
