"""Checks of the tensors and numbers that ops are given: their types, shapes, dtypes and devices.

They raise errors that say what must hold, what was given and what to do. None here looks at the
values of a tensor, so none synchronises with a GPU; others ask `values_known` before they do.
"""

import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from dblocks.ops._dispatch import FLOATS, NORMS, remember


def type_name(value: object) -> str:
    """The name of the type of `value` in messages."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def check_tensor(**tensors: object) -> None:
    """Every argument is a dense tensor: the first check of an op."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name} must be a tensor, got {type_name(tensor)}; use torch.as_tensor"
            )
        if tensor.layout != torch.strided or tensor.is_nested:
            kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
            raise TypeError(f"{name} must be a dense tensor, got {kind}; convert it first")


def check_number(name: str, value: object) -> None:
    """`value` is a real number, a symbolic one of a graph included."""
    if type(value) is float:
        return
    if not isinstance(value, (numbers.Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a real number, got {type_name(value)}; convert it first")


def plain_number(value: Any) -> Any:
    """A real number as a float, which kernels take, unlike a number of numpy; symbols as they are.

    A symbolic number of a graph would lose its symbol.
    """
    if type(value) is float or isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value
    return float(value)


def check_float(**tensors: Tensor | None) -> None:
    """Every given argument is a dense tensor of one of the four floating dtypes."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        check_tensor(**{name: tensor})
        if tensor.dtype not in FLOATS:
            raise TypeError(
                f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}; "
                "convert it first"
            )


def check_device(like: Tensor, **tensors: Tensor | None) -> None:
    """Every given tensor is on the device of `like`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != like.device:
            raise RuntimeError(
                f"{name} must be on {like.device} as the other tensors are, "
                f"got {tensor.device}; move it there"
            )


def check_rows(
    x: Tensor,
    rows: Mapping[str, Tensor],
    modulation: Mapping[str, Tensor | None],
    channels: Mapping[str, Tensor | None],
    norm: str = "layer",
    eps: float = 0.0,
) -> None:
    """`x` is [N, T, D], `rows` have its shape, the others fit it; keys are names in messages."""
    check_norm(norm, eps)
    check_tensor(x=x, **rows)
    check_tokens("x", x)
    for name, tensor in rows.items():
        check_same_shape(name, tensor, "x", x)
    given = {**rows, **modulation, **channels}
    check_float(x=x, **given)
    check_device(x, **given)
    check_modulation(x, **modulation)
    check_channels(x, **channels)
    remember((len(rows), len(modulation)), (x, *given.values()))


def check_tokens(name: str, x: Tensor) -> None:
    """`x` is [N, T, D]."""
    if x.ndim != 3:
        raise ValueError(
            f"{name} must have shape [N, T, D], got {list(x.shape)}; add or merge dimensions"
        )


def check_same_shape(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """`tensor` has the shape of `like`."""
    if tensor.shape != like.shape:
        raise ValueError(
            f"{name} must have the shape of {like_name}, {list(like.shape)}, "
            f"got {list(tensor.shape)}"
        )


def check_modulation(x: Tensor, **modulation: Tensor | None) -> None:
    """Each modulation is [N, D] or [N, S, D] with S dividing T, and all have one S."""
    N, T, D = x.shape
    first: tuple[str, int] | None = None
    for name, m in modulation.items():
        if m is None:
            continue
        if m.ndim not in (2, 3) or m.shape[0] != N or m.shape[-1] != D:
            raise ValueError(
                f"{name} must have shape [N, D] = [{N}, {D}] or [N, S, D] = [{N}, S, {D}], "
                f"got {list(m.shape)}"
            )
        S = m.shape[1] if m.ndim == 3 else 1
        if T % S != 0 if S else T != 0:
            raise ValueError(
                f"{name} must have a number of segments S that divides T = {T}, got S = {S}"
            )
        if first is not None and first[1] != S:
            raise ValueError(
                f"{name} must have as many segments as {first[0]}, {first[1]}, got {S}; "
                "expand one of them"
            )
        first = first or (name, S)


def check_channels(x: Tensor, **parameters: Tensor | None) -> None:
    """Each parameter (weight, bias) is [D]."""
    D = x.shape[-1]
    for name, p in parameters.items():
        if p is not None and p.shape != (D,):
            raise ValueError(f"{name} must have shape [D] = [{D}], got {list(p.shape)}")


def check_norm(norm: str, eps: float) -> None:
    """`norm` is known and `eps` is a number that cannot make the root negative."""
    if norm not in NORMS:
        raise ValueError(f"norm must be 'layer' or 'rms', got {norm!r}")
    check_number("eps", eps)
    if not eps >= 0:
        raise ValueError(f"eps must be a number >= 0, got {eps}")


def check_out_dtype(dtype: torch.dtype | None) -> None:
    """`dtype` is absent or one of the four floating dtypes."""
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(
            f"out_dtype must be float64, float32, bfloat16 or float16, got {dtype}; leave it out "
            "to keep the dtype of x"
        )


def values_known(tensor: Tensor) -> bool:
    """Whether a check may read the values of a tensor without synchronisation.

    On a GPU reading would synchronise; graphs and fake tensors have no values.
    """
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not isinstance(tensor, FakeTensor)


def check_classes(classes: Tensor, V: int) -> None:
    """Every class is in [0, V): at once on a CPU, else by the device itself."""
    if not classes.numel():
        return
    message = f"target must be in [0, V) = [0, {V}) or ignore_index"
    if not classes.is_cpu:
        valid = ((classes >= 0) & (classes < V)).all()
        torch._assert_async(valid, message)  # pyright: ignore[reportPrivateImportUsage]
        return
    low, high = (value.item() for value in classes.aminmax())
    if low < 0 or high >= V:
        raise ValueError(f"{message}, got {low if low < 0 else high}; check the tokens")
