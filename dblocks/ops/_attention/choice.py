"""Which implementation of doubled_attention runs: the table behind impl="auto".

| tensors | implementation |
|---|---|
| float64, or in a torch.func transform or forward-mode differentiation | reference |
| on a CPU, T < 32 | reference: fewer operations, which are all overhead at such sizes |
| on a CPU, T >= 32 | composed: as fast at 32, two to three times as fast at 128 |
| on a GPU, block_size 1, T of COMPOSED_TOKENS, a backend as fast as FlashAttention 3 | composed |
| on a GPU, else, of sizes that the Triton kernels take | triton: one launch, and no merge |
| on a GPU, else, where a backend takes them | composed |
| elsewhere | reference |

The rows for GPUs, and COMPOSED_TOKENS, follow from the designs and are not measured: for few tokens
the launches and the merge cost more than faster matrix products save. Options that a backend does
not take leave the tensors to the next row. A given `backend` means composed.
"""

from typing import Any

import torch
from torch import Tensor

from dblocks.ops import _dispatch
from dblocks.ops._attention import backends, fused

OP = "doubled_attention"
IMPLS = ("auto", "reference", "triton", "composed")
MIN_COMPOSED_TOKENS = 32  # on a CPU
# T from which on, by the widest head: a measurement replaces these numbers.
COMPOSED_TOKENS = {64: 4096, 128: 2048, 256: 2048}
BACKENDS = tuple(backends.BACKENDS)


def resolve(
    impl: str, backend: str | None, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
) -> str:
    """The implementation for these tensors; a named one that cannot run raises."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        if impl not in ("auto", "composed"):
            raise ValueError(
                f"backend must be None with impl={impl!r}, got {backend!r}; "
                "it says what impl='composed' is made of"
            )
        impl = "composed"
    _dispatch.refuse_sharded(impl, q, OP)
    if impl == "auto":
        return explained(q, k, v, **options)[0]
    _dispatch.check_transform(impl, OP)
    if impl == "triton":
        _dispatch.check_triton(q, OP)
    return impl


def explained(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int = 1,
    cu_seqlens: Tensor | None = None,
    valid: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    **_: Any,
) -> tuple[str, str]:
    """What impl="auto" picks, and why; options are those of doubled_attention."""
    if q.dtype == torch.float64:
        return "reference", "plain PyTorch: the tensors are float64"
    if _dispatch.in_transform():
        return "reference", "plain PyTorch: only it takes part in transforms"
    if q.is_cpu:
        if k.shape[2] // 2 < MIN_COMPOSED_TOKENS:
            return "reference", f"plain PyTorch: a CPU, and T < {MIN_COMPOSED_TOKENS}"
        return "composed", "the tensors are on a CPU: PyTorch's flash attention, twice, merged"
    if q.device.type in _dispatch.GPUS:
        able = [
            name
            for name in BACKENDS
            if backends.obstacle(
                name, q, v, cu_seqlens=cu_seqlens, valid=valid, window=window, softcap=softcap,
                alibi_slopes=alibi_slopes,
            ) is None
        ]  # fmt: skip
        fast = [name for name in able if backends.is_fast(name, q)]
        if fast and block_size == 1 and k.shape[2] // 2 >= _composed_tokens(q, v):
            return "composed", f"a GPU with fast attention, and many tokens: {fast[0]}, merged"
        if _dispatch.HAS_TRITON and fused.obstacle(q, k, v, block_size) is None:
            return "triton", "the tensors are on a GPU"
        if able:
            name = (fast or able)[0]
            return "composed", f"a GPU, but no Triton or not its sizes: {name}, twice, merged"
    return "reference", "plain PyTorch: no other implementation serves these tensors"


def _composed_tokens(q: Tensor, v: Tensor) -> float:
    widest = max(q.shape[-1], v.shape[-1])
    return next((T for width, T in COMPOSED_TOKENS.items() if widest <= width), float("inf"))
