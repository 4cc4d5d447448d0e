"""The C++ ops called by name, past the checks of the public functions: they check too."""

import pytest
import torch

from tools import needs_cpp, op

pytestmark = needs_cpp

N, T, D = 3, 4, 6
F32 = torch.float32


def rows(*names):
    return {name: torch.randn(N, T, D) for name in names}


NORM = {
    **rows("x", "branch"),
    **{name: torch.randn(N, D) for name in ("gate", "shift", "scale")},
    **{name: torch.randn(D) for name in ("weight", "bias")},
}
LEVELS = {"sigma": torch.rand(N, 2) + 0.1}
BOTH_LEVELS = {**LEVELS, "sigma_next": torch.rand(N, 2), "value": 1.0, "next_value": 1.0}
SEED = {"seed_tensor": torch.tensor(3), "seed": 0, "offset": 0, "sigma_data": 0.5}
LOSS = {**rows("f", "y"), **LEVELS, **SEED, "row_weight": torch.rand(N, T)}

# The arguments of each op, in their order.
OPS = {
    "adaln_fwd": {**NORM, "normalise": True, "rms": False, "eps": 1e-6, "out_dtype": F32},
    "adaln_bwd": {
        **rows("dy", "dx_new"), **NORM,
        "mean": torch.rand(N, T), "rstd": torch.rand(N, T), "rms": False, "needs": [True] * 7,
    },
    "noise_inject_fwd": {**rows("y"), **LEVELS, **SEED, "dtype": F32, "need_z": True},
    "noise_inject_bwd": {**rows("dz", "dz_in"), **LEVELS, "sigma_data": 0.5, "dtype": F32},
    "edm_denoise_fwd": {**rows("f", "z"), **LEVELS, "sigma_data": 0.5},
    "edm_denoise_bwd": {**rows("grad"), **LEVELS, "sigma_data": 0.5, "f": F32, "z": F32},
    "edm_loss_fwd": {**LOSS, "need_rest": True},
    "edm_loss_bwd": {
        "grad": torch.rand(N), **rows("rest"), "row_weight": LOSS["row_weight"], "dtype": F32,
    },
    "euler_step_fwd": {**rows("z", "denoised"), **BOTH_LEVELS},
    "euler_step_bwd": {**rows("grad"), **BOTH_LEVELS, "z": F32, "denoised": F32},
}  # fmt: skip

WRONG = {
    "wider": lambda t: torch.zeros(*t.shape[:-1], t.shape[-1] + 1),
    "narrower": lambda t: torch.zeros(*t.shape[:-1], max(t.shape[-1] - 1, 0)),
    "another N": lambda t: torch.zeros(t.shape[0] + 1, *t.shape[1:]) if t.ndim else t.view(1),
    "a dimension more": lambda t: torch.zeros(*t.shape, 1, 1),
    "a dimension less": lambda t: torch.zeros(t.shape[1:]),
    "integers": lambda t: torch.zeros(t.shape, dtype=torch.int32),
    "complex": lambda t: torch.zeros(t.shape, dtype=torch.complex64),
}
# A sample may have any size, and no level or any number of segments that divides T.
FINE = {
    (name, argument, wrong)
    for name, argument in (("noise_inject_fwd", "y"), ("edm_denoise_bwd", "grad"),
                           ("euler_step_bwd", "grad"), ("edm_loss_bwd", "rest"))
    for wrong in ("wider", "narrower")
} | {(name, "sigma", "narrower") for name in OPS} | {
    (name, "sigma_next", "narrower") for name in OPS
}  # fmt: skip
CASES = [
    (name, argument, wrong)
    for name, arguments in OPS.items()
    for argument, value in arguments.items()
    if isinstance(value, torch.Tensor) and argument != "seed_tensor"
    for wrong in WRONG
    if (name, argument, wrong) not in FINE and (value.ndim > 1 or wrong != "a dimension less")
]


@pytest.mark.parametrize("name", OPS)
def test_the_arguments_are_right(name):
    op(name, "cpp")(*OPS[name].values())


@pytest.mark.parametrize(("name", "argument", "wrong"), CASES)
def test_a_tensor_that_does_not_fit_is_refused(name, argument, wrong):
    arguments = OPS[name] | {argument: WRONG[wrong](OPS[name][argument])}
    with pytest.raises(RuntimeError, match=rf"{name}_cpp"):
        op(name, "cpp")(*arguments.values())


@pytest.mark.parametrize("seed", [torch.zeros(2, dtype=torch.int64), torch.tensor(3.0)])
@pytest.mark.parametrize("name", ["noise_inject_fwd", "edm_loss_fwd"])
def test_a_seed_is_one_integer(name, seed):
    with pytest.raises(RuntimeError, match="seed must be a 0-d int64 tensor"):
        op(name, "cpp")(*(OPS[name] | {"seed_tensor": seed}).values())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("adaln_fwd", {"x": torch.zeros(N, T, D).double()}, "x must not be float64"),
        ("adaln_fwd", {"gate": torch.zeros(N, 2, D)}, "segments as the others have"),
        ("adaln_fwd", {"out_dtype": torch.int32}, "floating dtypes only"),
        ("adaln_bwd", {"needs": [True] * 3}, "7 elements, got 3"),
        ("adaln_bwd", {"dy": None, "dx_new": None}, "one of dy and dx_new"),
        ("adaln_bwd", {"rstd": torch.rand(T, N).T}, "rstd must be contiguous"),
        ("noise_inject_fwd", {"dtype": torch.int8}, "floating dtypes only"),
        ("noise_inject_fwd", {"y": torch.zeros(N, D)}, "S that divides T"),
        ("euler_step_fwd", {"sigma_next": torch.rand(N, 4)}, "must have 2 segments"),
        ("edm_loss_fwd", {"row_weight": torch.rand(N, T, 1)}, "row_weight must have shape"),
    ],
)
def test_what_one_tensor_alone_does_not_show(name, changes, message):
    with pytest.raises(RuntimeError, match=message):
        op(name, "cpp")(*(OPS[name] | changes).values())
