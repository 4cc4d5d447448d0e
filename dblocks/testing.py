"""Error budgets and hypothesis strategies for testing a kernel against its reference.

The strategies import hypothesis when they are called; the budgets need torch only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hypothesis import strategies as st

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "chunk", "expanded", "strided", "transposed")


def error_budget(ref64: Tensor, eager: Tensor, dtype: torch.dtype) -> float:
    """The largest error allowed: `2 max|eager - ref64| + 4 eps(dtype) max|ref64|`.

    `eager` is the plain PyTorch result in the dtypes under test, so the budget follows the data
    and needs no constant chosen by hand. Elements that are not finite in either are left out, since
    an overflow of `eager` would allow any error.
    """
    finite = _finite(ref64, eager)
    if not finite.any():
        return 0.0
    own = (eager.double() - ref64)[finite].abs().max().item()
    return 2 * own + 4 * torch.finfo(dtype).eps * ref64[finite].abs().max().item()


def _finite(ref64: Tensor, eager: Tensor) -> Tensor:
    """The elements that are finite in both."""
    return ref64.isfinite() & eager.isfinite()


def assert_within_budget(got: Tensor, ref64: Tensor, eager: Tensor, name: str = "result") -> None:
    """Asserts that `got` has the shape and dtype of `eager` and is within the budget of `ref64`.

    Where `eager` or `ref64` is not finite, `got` must equal `eager`.
    """
    assert got.shape == ref64.shape, f"{name}: shape {list(got.shape)} != {list(ref64.shape)}"
    assert got.dtype == eager.dtype, f"{name}: dtype {got.dtype} != {eager.dtype}"
    finite = _finite(ref64, eager)
    same = (got == eager) | (got.isnan() & eager.isnan())
    assert (finite | same).all(), f"{name}: differs where the plain result is not finite"
    if not finite.any():
        return
    error = (got.double() - ref64)[finite].abs().max().item()
    budget = error_budget(ref64, eager, got.dtype)
    assert error <= budget, f"{name}: error {error:.3e} is over the budget {budget:.3e}"


def make(
    shape: Sequence[int],
    layout: str,
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    device: torch.device | str = "cpu",
    mean: float = 0.0,
) -> Tensor:
    """Normal values of `shape` in one of LAYOUTS; the last stride is 1 except for "transposed".

    "chunk" is a chunk of a wider tensor, "expanded" repeats the first sample with stride 0,
    "strided" skips every other element of the first dimension.

    Raises:
        ValueError: another layout.
    """
    first, last = shape[0], shape[-1]

    def draw(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator) + mean).to(device, dtype)

    match layout:
        case "chunk":
            return draw(*shape[:-1], 3 * last)[..., last : 2 * last]
        case "expanded":
            return draw(1, *shape[1:]).expand(*shape)
        case "strided":
            return draw(2 * first, *shape[1:])[::2]
        case "transposed":
            return draw(*reversed(shape)).permute(*reversed(range(len(shape))))
        case "contiguous":
            return draw(*shape)
        case _:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")


def token_shapes(max_rows: int = 64, max_width: int = 40) -> st.SearchStrategy[Any]:
    """Shapes (N, T, D) with N T <= `max_rows`, odd and power-of-two widths alike."""
    from hypothesis import strategies as st

    def build(n: int, t: int, d: int) -> tuple[int, int, int]:
        return n, min(t, max(1, max_rows // n)), d

    tokens = st.integers(1, max_rows)
    widths = st.one_of(st.integers(1, max_width), st.sampled_from([1, 2, 16, 32, 64]))
    return st.builds(build, st.sampled_from([1, 2, 3, 5]), tokens, widths)


def segment_counts(T: int) -> st.SearchStrategy[int]:
    """The numbers of segments S in {1, 2, T} (and every other divisor) that divide T."""
    from hypothesis import strategies as st

    return st.sampled_from([s for s in range(1, T + 1) if T % s == 0])


def token_problems(
    rows: Sequence[str],
    modulation: Sequence[str],
    channels: Sequence[str],
    *,
    required: Sequence[str],
    outputs: int,
    max_rows: int = 64,
    device: torch.device | str = "cpu",
) -> st.SearchStrategy[Any]:
    """Inputs by name and upstream gradients for an op on rows [N, T, D].

    `rows` are [N, T, D], `modulation` [N, D] or [N, S, D], `channels` [D]; those not `required` are
    left out at random, as are all but one of the upstream gradients. Layouts and dtypes are drawn
    for each.
    """
    from hypothesis import strategies as st

    @st.composite
    def build(draw: Any) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        N, T, D = draw(token_shapes(max_rows))
        S = draw(st.one_of(st.just(0), segment_counts(T)))
        shapes = dict.fromkeys(rows, (N, T, D)) | dict.fromkeys(channels, (D,))
        shapes |= dict.fromkeys(modulation, (N, S, D) if S else (N, D))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        dtypes = st.sampled_from(DTYPES)

        def tensor(shape: Sequence[int], mean: float = 0.0) -> Tensor:
            layout = draw(st.sampled_from(LAYOUTS)) if len(shape) > 1 else "contiguous"
            return make(shape, layout, draw(dtypes), generator, device=device, mean=mean)

        inputs = {}
        for name, shape in shapes.items():
            if name in required or draw(st.booleans()):
                inputs[name] = tensor(shape, draw(st.sampled_from([0.0, 3.0])))
        upstream: list[Tensor | None] = [tensor((N, T, D)) for _ in range(outputs)]
        if outputs > 1 and draw(st.booleans()):
            upstream[draw(st.integers(0, outputs - 1))] = None
        return inputs, upstream

    return build()


def grads_of(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], upstream: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of `inputs` for the given upstream gradients; a `None` leaves its output unused."""
    # An output that depends on none of the inputs has no gradient to pass on.
    pairs = zip(outputs, upstream, strict=True)
    used = [(o, g) for o, g in pairs if g is not None and o.requires_grad]
    if not used:
        return [None for _ in inputs]
    return list(
        torch.autograd.grad(
            [o for o, _ in used], inputs, [g.to(o.dtype) for o, g in used], allow_unused=True
        )
    )


def check_against_reference(
    call: Callable[..., Tensor | Sequence[Tensor]],
    inputs: dict[str, Tensor],
    upstream: Sequence[Tensor | None],
    *,
    impl: str,
    needs_grad: Sequence[str] | None = None,
) -> None:
    """Asserts that outputs and gradients of `impl` are within budget of the float64 reference.

    Also asserts that outputs are contiguous, whatever the strides of the inputs. `call(impl=...,
    **inputs)` returns a tensor or a sequence of tensors. Gradients are taken for `needs_grad`
    (every input by default) with `upstream`, one for each output; `None` leaves it unused.

    Raises:
        AssertionError: an output or a gradient exceeds its budget.
        ValueError: `upstream` has more or fewer entries than `call` has outputs.
    """
    names = list(inputs) if needs_grad is None else list(needs_grad)

    def run(impl: str, dtype: torch.dtype | None) -> list[Tensor | None]:
        leaves = {k: _leaf(v, dtype, k in names) for k, v in inputs.items()}
        result = call(impl=impl, **leaves)
        # A tensor is a sequence too, of its rows: taken as one, it would be cut into outputs.
        outputs = [result] if isinstance(result, Tensor) else list(result)
        if names and len(outputs) != len(upstream):
            raise ValueError(
                f"upstream must have one gradient (or None) for each of the {len(outputs)} outputs "
                f"of call, got {len(upstream)}"
            )
        for i, output in enumerate(outputs):
            assert output is None or output.is_contiguous(), f"{impl}, output {i}: not contiguous"
        grads = grads_of(outputs, [leaves[k] for k in names], upstream) if names else []
        return [*outputs, *grads]

    got, ref64, eager = run(impl, None), run("reference", torch.float64), run("reference", None)
    outputs = len(got) - len(names)
    labels = [*(f"output {i}" for i in range(outputs)), *(f"gradient of {k}" for k in names)]
    for label, g, r, e in zip(labels, got, ref64, eager, strict=True):
        assert (g is None) == (r is None), f"{label}: None in one implementation only"
        if g is not None and r is not None and e is not None:
            assert_within_budget(g, r, e, f"{impl}, {label}")


def _leaf(value: Tensor, dtype: torch.dtype | None, requires_grad: bool) -> Tensor:
    """`value` as a leaf with its strides, in `dtype` if one is given."""
    if dtype is not None and value.is_floating_point():
        value = value.to(dtype)
    return value.detach().requires_grad_(requires_grad)
