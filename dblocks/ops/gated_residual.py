"""gated_residual: add a gated branch to the residual stream."""

from torch import Tensor

from dblocks.kernels import reference
from dblocks.ops import _checks, _dispatch
from dblocks.ops._dispatch import Impl
from dblocks.ops.adaln import fused


def gated_residual(
    x: Tensor, branch: Tensor, gate: Tensor | None, *, impl: Impl = "auto"
) -> Tensor:
    """Gated residual sum: `x_new = x + gate * branch`.

    Args:
        x: `[N, T, D]`, strides as in `adaln`.
        branch: `[N, T, D]`; may differ from `x` in dtype.
        gate: `[N, D]`, or `[N, S, D]` per segment of T/S consecutive tokens; `None` is 1.
        impl: "reference", "triton", "cpp" or "auto", which chooses as in `adaln`.

    Returns:
        x_new `[N, T, D]` in the dtype of `x`, contiguous. Arithmetic is float32 (float64 for
        float64 `x`), rounded once.

    Raises:
        ValueError: for a shape that does not fit.
        TypeError: for a dtype that is not floating.
        RuntimeError: for tensors on several devices, or a named `impl` that cannot run here.
        ImportError: for impl="triton" without the package triton.

    Source: Peebles and Xie 2023 (DiT), adaLN-Zero block.
    """
    if not _dispatch.rows_fit(x, (branch,), (gate,)):
        _checks.check_rows(x, {"branch": branch}, {"gate": gate}, {})
    impl = _dispatch.resolve_impl(impl, x, "gated_residual")
    if impl != "reference":
        return fused("gated_residual", impl, x, branch, gate, normalise=False)
    return reference.gated_residual(x, branch, gate)
