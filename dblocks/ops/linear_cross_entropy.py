"""linear_cross_entropy: output head and cross-entropy, without the logits of all rows at once."""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch._C._autograd import _get_current_graph_task_keep_graph

from dblocks.kernels import reference
from dblocks.ops import _checks, _dispatch
from dblocks.ops import _chunked_cross_entropy as chunked
from dblocks.ops._dispatch import check_first_order, constant, distinct, kept
from dblocks.ops._library import define

CrossEntropyImpl = Literal["auto", "reference", "chunked", "triton"]
Reduction = Literal["mean", "none"]

OP = "linear_cross_entropy"
IMPLS = ("auto", "reference", "chunked", "triton")
MAX_TRITON_CLASSES = 2**31 - 2**13  # classes have int32 numbers, and a block may pass the last

_SCHEMA = (
    "(Tensor h, Tensor weight, Tensor target, Tensor? bias, Tensor? row_weight, "
    "SymInt ignore_index, bool[] needs) -> "
    "(Tensor loss, Tensor scale, Tensor dh, Tensor dweight, Tensor dbias, Tensor losses)"
)


def _fake(h, weight, target, bias, row_weight, ignore_index, needs):
    total = torch.promote_types(h.dtype, torch.float32)
    sizes = ((), (), h.shape, weight.shape, weight.shape[:1], target.shape)
    needed = (True, True, *needs, True)
    return tuple(
        h.new_empty(size if need else (0,), dtype=total)
        for size, need in zip(sizes, needed, strict=True)
    )


_IMPLEMENTED = {"chunked": chunked.plain, "triton": chunked.triton}
_OPS = define("linear_cross_entropy", _SCHEMA, _fake, **_IMPLEMENTED)
# The same for the gradients in a second pass, whose flops are counted separately.
_AGAIN = define("linear_cross_entropy_again", _SCHEMA, _fake, **_IMPLEMENTED)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, bias, target, row_weight, ignore_index, needs, impl):
        ctx.set_materialize_grads(False)
        out = _OPS[impl](h, weight, target, bias, row_weight, ignore_index, needs)
        loss, scale, *sums, _ = out
        ctx.save_for_backward(scale, *sums)
        ctx.dtypes = [h.dtype, weight.dtype, None if bias is None else bias.dtype]
        return loss

    @staticmethod
    def backward(ctx, grad):
        check_first_order("linear_cross_entropy")
        if grad is None:
            return (None,) * 8
        scale, *sums = ctx.saved_tensors
        factor = grad * scale
        grads = [
            _scaled(total, factor, dtype) if needed else None
            for total, dtype, needed in zip(sums, ctx.dtypes, ctx.needs_input_grad, strict=False)
        ]
        return (*grads, *(None,) * 5)


class _RowLosses(torch.autograd.Function):
    """Losses of rows: the upstream gradients are row weights, known only in the backward."""

    @staticmethod
    def forward(ctx, h, weight, bias, target, ignore_index, impl):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, weight, bias, *kept(target))
        ctx.ignore_index, ctx.impl = ignore_index, impl
        return _OPS[impl](h, weight, target, bias, None, ignore_index, [False] * 3)[-1]

    @staticmethod
    def backward(ctx, grad):
        check_first_order("linear_cross_entropy")
        if grad is None:
            return (None,) * 6
        h, weight, bias, target = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        out = _AGAIN[ctx.impl](h, weight, target, bias, grad, ctx.ignore_index, needs)
        _, scale, *sums, _ = out
        # The op divides by the number of rows that count.
        factor = scale * (target != ctx.ignore_index).sum().clamp(min=1)
        grads = [
            total.mul_(factor).to(x.dtype) if needed else None
            for total, x, needed in zip(sums, (h, weight, bias), needs, strict=True)
        ]
        return (*grads, None, None, None)


def _scaled(total: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`total * factor`, rounded to `dtype` once."""
    # In place where possible: the gradient of a large weight would be in memory twice.
    last = not _dispatch.is_traced() and not _get_current_graph_task_keep_graph()
    return (total.mul_(factor) if last else total * factor).to(dtype)


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    impl: CrossEntropyImpl = "auto",
) -> Tensor:
    """Cross-entropy of a linear output head, with a weight for each row, in chunks of rows.

        logits = h weight^T + bias,   ce_r = logsumexp(logits_r) - logits_r[target_r]
        loss = sum_r row_weight_r * ce_r / count;   reduction="none": row_weight_r * ce_r

    over the `count` rows r whose target is not `ignore_index`; weights are not normalised. Without
    such rows the loss and all gradients are 0, not NaN as in PyTorch, so that a batch of padding
    does not harm training. Rows that are ignored or have weight 0 may hold anything, NaN included.

    At a time, memory holds the logits of at most a quarter of the rows, of 128 rows, or 2^20
    logits, whichever is most; for large vocabularies at most 2^25 on a CPU and 2^27 on a GPU.
    Gradients of those of `h`, `weight` and `bias` that require one are computed in the forward and
    kept in float32 until the upstream gradient is known.

    Args:
        h: rows `[..., D]`, such as `[N, T, D]`.
        weight: `[V, D]`; rounded to the dtype of `h` if it has another.
        target: classes in [0, V) or `ignore_index`, int64 of the leading shape of `h`. On a GPU the
            values are checked there, without waiting for them.
        bias: `[V]`, added in float32.
        row_weight: factors of the leading shape of `h`. Gets no gradient.
        ignore_index: the target of rows that do not count.
        reduction: "mean", or "none" for the loss of each row, 0 for rows that do not count. The
            backward of the latter recomputes the logits, since the weights come from upstream.
        impl: "reference" (logits of all rows at once, in plain PyTorch: any transform), "chunked"
            (plain PyTorch: any device), "triton" (GPU; not float64), or "auto": "triton" on a GPU
            and "chunked" elsewhere and for float64, but the reference inside torch.func transforms
            and forward-mode differentiation.

    Returns:
        loss, 0-d (for "none" of the shape of `target`), float32 (float64 if `h` is). Logits,
        exponentials and sums have its dtype. Matrix products take operands of the dtype of `h` and
        sum in that of the loss; "triton" rounds the gradient of the logits to the dtype of `h` for
        them, and "chunked" computes them in the dtype of the loss altogether. Every gradient has
        its input's dtype. PyTorch's settings for float32 products on GPUs (TF32) hold here too.

    Raises:
        ValueError: for an invalid shape or value (of `target`, on the CPU only).
        TypeError: for an invalid dtype.
        RuntimeError: for tensors on several devices, or a named `impl` that cannot run here.
        ImportError: for impl="triton" without the package triton.

    Source: Hsu et al. 2024 (Liger kernel), section 3.2, for gradients in the forward.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")
    tensors = (h, weight, target, bias, row_weight)
    if not _dispatch.seen((OP, type(ignore_index)), tensors):
        _check(*tensors, ignore_index)
        _dispatch.remember((OP, type(ignore_index)), tensors)
    row_weight = None if row_weight is None else constant(row_weight)
    used = _resolve(impl, h, weight)
    if used == "reference":
        if target.is_cpu and not _dispatch.is_traced():
            _checks.check_classes(target.where(target != ignore_index, 0), weight.shape[0])
        return reference.linear_cross_entropy(
            h, weight, target, bias=bias, row_weight=row_weight, ignore_index=ignore_index,
            reduction=reduction,
        )  # fmt: skip
    shape = target.shape
    h, target = h.reshape(target.numel(), h.shape[-1]), target.reshape(-1)
    if reduction == "none":
        losses = _row_losses(used, h, weight, bias, target, ignore_index).view(shape)
        return losses if row_weight is None else _weighted(losses, row_weight)
    row_weight = None if row_weight is None else row_weight.reshape(-1)
    if not _dispatch.needs_autograd(h, weight, bias):
        needs = [False] * 3
        return _OPS[used](h, weight, target, bias, row_weight, ignore_index, needs)[0]
    needs = [_dispatch.needs_autograd(t) for t in (h, weight, bias)]
    return _Loss.apply(*distinct(h, weight, bias, target, row_weight, ignore_index, needs, used))


def _row_losses(
    impl: str, h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int
) -> Tensor:
    if _dispatch.needs_autograd(h, weight, bias):
        return _RowLosses.apply(*distinct(h, weight, bias, target, ignore_index, impl))
    return _OPS[impl](h, weight, target, bias, None, ignore_index, [False] * 3)[-1]


def _weighted(losses: Tensor, row_weight: Tensor) -> Tensor:
    """Weighted losses; a row of weight 0 may have a loss that is not finite."""
    weights = row_weight.to(losses.dtype)
    return torch.where(weights != 0, losses * weights, 0)


def _resolve(impl: str, h: Tensor, weight: Tensor) -> str:
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    _dispatch.refuse_sharded(impl, h, OP)
    if impl == "auto":
        impl = explained(h)[0]
    _dispatch.check_transform(impl, OP)
    if impl == "triton":
        _dispatch.check_triton(h, OP)
        if weight.shape[0] > MAX_TRITON_CLASSES:
            raise ValueError(
                f"{OP}: impl='triton' takes V <= {MAX_TRITON_CLASSES}, got {weight.shape[0]}; "
                "use impl='chunked'"
            )
    return impl


def explained(h: Tensor) -> tuple[str, str]:
    """What impl="auto" picks, and why."""
    if _dispatch.in_transform():
        return "reference", "plain PyTorch: only it takes part in transforms"
    if h.device.type in _dispatch.GPUS and h.dtype != torch.float64:
        return "triton", "the tensors are on a GPU"
    return "chunked", "plain PyTorch, in chunks of rows: it serves every device and dtype"


def _check(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    row_weight: Tensor | None,
    ignore_index: int,
) -> None:
    _checks.check_tensor(h=h, weight=weight, target=target)
    _checks.check_float(h=h, weight=weight, bias=bias, row_weight=row_weight)
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}; call .long()")
    if not isinstance(ignore_index, (int, torch.SymInt)):
        raise TypeError(
            f"ignore_index must be an int, got {_checks.type_name(ignore_index)}; convert it first"
        )
    _checks.check_device(h, weight=weight, target=target, bias=bias, row_weight=row_weight)
    if h.ndim < 1:
        raise ValueError("h must have shape [..., D], got a 0-d tensor; add a dimension")
    D = h.shape[-1]
    if weight.ndim != 2 or weight.shape[1] != D or weight.shape[0] < 1:
        raise ValueError(
            f"weight must have shape [V, D] = [V, {D}] with V >= 1, got {list(weight.shape)}; "
            "it is that of nn.Linear(D, V)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [V] = [{weight.shape[0]}], got {list(bias.shape)}")
    for name, tensor in {"target": target, "row_weight": row_weight}.items():
        if tensor is not None and tensor.shape != h.shape[:-1]:
            raise ValueError(
                f"{name} must have the leading shape of h, {list(h.shape[:-1])}, "
                f"got {list(tensor.shape)}; reshape or expand it"
            )
