"""Formulas for `torch.utils.flop_counter`: the useful work of an op, the same for every `impl`.

Formulas see shapes and options, but not values: document boundaries and valid ranges are ignored.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

Shape = Sequence[int]

_registered: dict[Any, Callable[..., int]] = {}


def register(op: torch._ops.OpOverload, formula: Callable[..., int]) -> None:
    """Counts `formula(**arguments)`, of the op's arguments by name with shapes for tensors."""
    names = [argument.name for argument in op._schema.arguments]

    def counted(*args: Any, out_shape: Any = None, **named: Any) -> int:
        return formula(**dict(zip(names, args, strict=False)), **named)

    _registered[op.overloadpacket] = counted
    watch()


def watch() -> None:
    """Registers the formulas with the flop counters, including active ones.

    PyTorch's module, which imports triton, is not imported for it.
    """
    if "torch.utils.flop_counter" not in sys.modules:
        return
    module: Any = sys.modules["torch.utils.flop_counter"]
    for packet, formula in _registered.items():
        if packet not in module.flop_registry:
            module.register_flop_formula(packet)(formula)
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(counter := getattr(mode, "counter", None), module.FlopCounterMode):
            registry = cast(Any, counter).flop_registry
            for packet in _registered:
                registry.setdefault(packet, module.flop_registry[packet])


def doubled_pairs(T: int, block_size: int, window: int | None, *, token: bool, both: bool) -> int:
    """Pairs of a row and a key that it attends to, of one head of one sequence."""
    full, rest = T // block_size, T % block_size
    to_block_end = block_size * block_size * full * (full + 1) // 2 + rest * T
    pairs = to_block_end  # noisy rows
    if both:
        pairs += T * (T + 1) // 2 if token else to_block_end
    beyond = 0 if window is None else max(T - window, 0)
    return pairs - (1 + both) * (beyond * (beyond + 1) // 2)


def doubled_attention(
    *, q: Shape, k: Shape, v: Shape, block_size: int, token: bool, window: int | None = None,
    **_: Any,
) -> int:  # fmt: skip
    """Two products of a query with a key and a probability with a value, for each pair."""
    T = k[2] // 2
    pairs = doubled_pairs(T, block_size, window, token=token, both=q[2] != T)
    return 2 * q[0] * q[1] * pairs * (k[3] + v[3])


def doubled_attention_backward(**arguments: Any) -> int:
    """Five products for the forward's two: as in PyTorch, the scores are recomputed."""
    return 5 * doubled_attention(**arguments) // 2


def linear_cross_entropy(*, h: Shape, weight: Shape, needs: Sequence[bool], **_: Any) -> int:
    """The logits, and one product for each of the gradients of h and weight."""
    return 2 * h[0] * h[1] * weight[0] * (1 + sum(needs[:2]))


def linear_cross_entropy_again(**arguments: Any) -> int:
    """The gradients only: recomputing the logits is not useful work."""
    return linear_cross_entropy(**arguments) - linear_cross_entropy(
        **{**arguments, "needs": (False,) * 3}
    )


# By the names that ops are defined by.
FORMULAS = {
    "doubled_attention_fwd": doubled_attention,
    "doubled_attention_bwd": doubled_attention_backward,
    "linear_cross_entropy": linear_cross_entropy,
    "linear_cross_entropy_again": linear_cross_entropy_again,
}
