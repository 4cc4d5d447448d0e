"""linear_cross_entropy in chunks of rows: its two implementations.

Each returns the loss, and gradients before the upstream factor.

The logits of a chunk are overwritten with their gradient, from which the chunk's part of every
gradient is taken at once, so that no later pass needs them. What the implementations differ in is
what happens to a chunk of logits.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from dblocks.ops import _checks

SHARES = 4  # the logits are never held in fewer parts, unless a part had fewer
MIN_LOGITS = 2**20  # logits (4 MiB), where each call would cost more than its work,
MIN_ROWS = 128  # or rows, which would make the matrix products slow.
# Beyond this size a larger chunk makes the products on a CPU hardly faster; on a GPU each chunk
# reads and writes the sum for dweight once, which pays off from some thousand rows.
MAX_LOGITS = {"cpu": 2**25, "cuda": 2**27}
ALIGNMENT = 16  # of rows of logits on a GPU, in elements: it moves 16 bytes at once


class Sums(NamedTuple):
    """The loss, and gradients of `loss / scale`; a gradient that is not needed has no elements."""

    loss: Tensor
    scale: Tensor
    dh: Tensor
    dweight: Tensor
    dbias: Tensor
    losses: Tensor
    """Of each row [R], before its weight; 0 where it has no part."""


# (logits, bias, target, losses, grad) -> factor. Writes the losses of a chunk of rows, and, where
# there is a `grad`, what times `factor` [rows, 1] is the gradient of the logits. `grad` is `logits`
# itself where that has the dtype of the products. dbias is summed from what is left in `logits`.
Rows = Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor | None], Tensor]


def chunk_rows(R: int, V: int, device_type: str) -> int:
    """Rows in a chunk: about equally many in each, a function of sizes and kind of device only."""
    most = MAX_LOGITS.get(device_type, MAX_LOGITS["cuda"]) // V
    largest = max(min(-(-R // SHARES), most), MIN_LOGITS // V, MIN_ROWS)
    return -(-R // -(-R // largest))


def forward(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    row_weight: Tensor | None,
    ignore_index: int,
    needs: Sequence[bool],
    *,
    rows: Rows,
    dtype: torch.dtype,
) -> Sums:
    """`h` [R, D], `target` and `row_weight` [R]; `needs` is for h, weight and bias.

    Operands of matrix products are of `dtype`; their results and all sums are float32 (float64).
    """
    total = _wide(h)
    (R, D), V = h.shape, weight.shape[0]
    counted = target != ignore_index
    target = target.where(counted, 0)
    _checks.check_classes(target, V)
    factors, scale = _factors(counted, row_weight, dtype, total)
    used = factors != 0
    all_used = used.is_cpu and bool(used.all())
    bias = None if bias is None else bias.to(total).contiguous()
    matrix = weight.to(h.dtype).to(dtype)

    def zeros(*shape: int, needed: bool = True) -> Tensor:
        return torch.zeros(shape if needed else 0, dtype=total, device=h.device)

    losses, dh = zeros(R), zeros(R, D, needed=needs[0])
    dweight, dbias = zeros(V, D, needed=needs[1]), zeros(V, needed=needs[2])
    size = chunk_rows(R, V, h.device.type) if R else 0

    def chunk(dtype: torch.dtype) -> Tensor:
        stride = V if h.is_cpu else -(-V // ALIGNMENT) * ALIGNMENT
        return torch.empty(size, stride, dtype=dtype, device=h.device)[:, :V]

    logits, grad = chunk(total), None
    if any(needs):
        grad = logits if dtype == total else chunk(dtype)
    for start in range(0, R, max(size, 1)):
        part = slice(start, min(start + size, R))
        of = slice(0, part.stop - start)
        h_part = h[part].to(dtype)
        if not all_used:
            # A row that does not count may hold anything, NaN and infinity included.
            h_part = h_part.where(used[part, None], 0)
        _product(h_part, matrix.t(), logits[of])
        if grad is None:
            rows(logits[of], bias, target[part], losses[part], None)
            continue
        grad_part = grad[of]
        factor = rows(logits[of], bias, target[part], losses[part], grad_part)
        factor = factor * factors[part, None]
        if needs[0]:
            _product(grad_part, matrix, dh[part])
            dh[part].mul_(factor)
        if needs[1]:
            _add_product(grad_part.t(), (h_part * factor).to(dtype), dweight)
        if needs[2]:
            dbias.addmv_(logits[of].t(), factor[:, 0])
    losses = losses if all_used else losses.where(used, 0)
    loss = (losses * factors).sum() * scale
    return Sums(loss, scale, dh, dweight, dbias, losses)


def _wide(h: Tensor) -> torch.dtype:
    return torch.float64 if h.dtype == torch.float64 else torch.float32


def _factors(
    counted: Tensor, row_weight: Tensor | None, dtype: torch.dtype, total: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The factor [R] of each row, 0 where it is not counted, and one for all of them."""
    weighted = counted if row_weight is None else row_weight.where(counted, 0)
    factors = weighted.to(total)
    scale = counted.sum().clamp(min=1).to(total).reciprocal()
    if dtype == torch.float16 and len(counted):
        # Weights may be larger than float16 can hold in a product: the largest becomes 1.
        largest = factors.abs().amax()
        largest = torch.where(largest > 0, largest, 1)
        factors, scale = factors / largest, scale * largest
    return factors, scale


def sums_wide(dtype: torch.dtype) -> bool:
    """Whether PyTorch's products of 16-bit numbers on a GPU can have float32 results.

    They cannot with sums in float16, or with the library CK on ROCm, which are global settings.
    """
    if dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation:
        return False
    if torch.version.hip is None:
        return True
    library = str(torch.backends.cuda.preferred_blas_library())  # such as _BlasBackend.Ck
    return library.rpartition(".")[2].lower() != "ck"


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, summed and kept in the dtype of `out`."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif out.is_cuda and sums_wide(a.dtype):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a @ b, summed and kept in the dtype of `out`."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif out.is_cuda and sums_wide(a.dtype):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


def plain_rows(
    logits: Tensor, bias: Tensor | None, target: Tensor, losses: Tensor, grad: Tensor | None
) -> Tensor:
    """Rows in plain PyTorch, in place: exponentials before the division by their sum."""
    if bias is not None:
        logits.add_(bias)
    own, peak = logits.gather(1, target[:, None]), logits.amax(1, keepdim=True)
    logits.sub_(peak).exp_()
    total = logits.sum(1, keepdim=True)
    losses.copy_((total.log() + (peak - own))[:, 0])
    if grad is not None:
        logits.scatter_(1, target[:, None], (own - peak).exp_() - total)
    return total.reciprocal_()


def plain(h, weight, target, bias, row_weight, ignore_index, needs):
    return forward(
        h, weight, target, bias, row_weight, ignore_index, needs,
        rows=plain_rows, dtype=_wide(h),
    )  # fmt: skip


def launch_rows(
    logits: Tensor, bias: Tensor | None, target: Tensor, losses: Tensor, grad: Tensor | None,
    in_place: bool,
) -> None:  # fmt: skip
    """Losses of rows and gradients in `grad`, over the logits, or both: see `rows_launch`."""
    from dblocks.kernels.cross_entropy import rows_launch

    tensors = (logits, grad, bias, target, losses)
    layouts = [None if x is None else (x.dtype, x.data_ptr() & 15) for x in tensors]
    launch = rows_launch(
        *logits.shape, logits.stride(0), grad is not None, in_place, (logits.device, *layouts)
    )
    launch.start(*tensors, *launch.numbers)


def triton(h, weight, target, bias, row_weight, ignore_index, needs):
    def rows(logits, bias, target, losses, grad):
        narrow = None if grad is None or grad.dtype == logits.dtype else grad
        in_place = grad is not None and (narrow is None or needs[2])
        launch_rows(logits, bias, target, losses, narrow, in_place)
        return losses.new_ones(len(losses), 1)

    with torch.cuda.device(h.device) if h.is_cuda else nullcontext():
        return forward(
            h, weight, target, bias, row_weight, ignore_index, needs, rows=rows, dtype=h.dtype
        )
