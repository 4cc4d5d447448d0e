"""The causal attentions that impl="composed" is made of: raw forward and backward of a library.

`forward(q, k, v, scale) -> (o, lse)` is causal attention of `[N, H, T, Dh]` queries over
`[N, Hkv, T, Dh]` keys and values; `lse` is the natural logarithm of each row's sum of exponentials,
float32 (float64 for float64) `[N, H, T]`. `backward(grad, q, k, v, o, lse, scale)` returns the
gradients of q, k and v. It is called with the `o` and `lse` of a softmax over *more* keys than
these, of which it then computes the share of these keys: flash attention's backward derives
everything from `exp(score - lse)` and `sum(grad * o)`.

The last stride of every tensor is 1.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

Grads = tuple[Tensor, Tensor, Tensor]


class Backend(NamedTuple):
    """What a library takes on a GPU, and its two functions."""

    package: str | None  # beside torch
    dtypes: tuple[torch.dtype, ...]
    max_width: int  # Dh is a multiple of 8 up to it
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Grads]
    capability: tuple[int, int] = (8, 0)  # of NVIDIA's GPUs, at least


def _no_dropout(q: Tensor) -> tuple[Tensor, Tensor]:
    """The seed and offset of a dropout that does not take place."""
    state = torch.empty((), dtype=torch.int64, device=q.device)
    return state, state


def _sdpa_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if q.is_cpu:
        return aten._scaled_dot_product_flash_attention_for_cpu.default(
            q, k, v, 0.0, bias is None, attn_mask=bias, scale=scale
        )
    return aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, True, scale=scale)[:2]


def _sdpa_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    bias: Tensor | None = None,
) -> Grads:
    if q.is_cpu:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
            grad, q, k, v, o, lse, 0.0, bias is None, attn_mask=bias, scale=scale
        )
    rows = q.shape[2]
    return aten._scaled_dot_product_flash_attention_backward.default(
        grad, q, k, v, o, lse.contiguous(), None, None, rows, rows, 0.0, True,
        *_no_dropout(q), scale=scale,
    )  # fmt: skip


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    o, lse, *_ = aten._scaled_dot_product_cudnn_attention.default(
        q, k, v, None, True, 0.0, True, scale=scale
    )
    return o, lse.view(q.shape[:3])  # cuDNN has a last dimension of 1


def _cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> Grads:
    rows = q.shape[2]
    return aten._scaled_dot_product_cudnn_attention_backward.default(
        grad, q, k, v, o, lse.unsqueeze(-1).contiguous(), *_no_dropout(q), None, None, None,
        rows, rows, 0.0, True, scale=scale,
    )  # fmt: skip


def _rows_first(*tensors: Tensor) -> list[Tensor]:
    """[N, heads, T, Dh] as [N, T, heads, Dh], and back."""
    return [x.transpose(1, 2) for x in tensors]


def _flash_attn_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_interface as library  # pyright: ignore[reportMissingImports]

    o, lse, *_ = library._wrapped_flash_attn_forward(
        *_rows_first(q, k, v), 0.0, scale, causal=True, window_size_left=-1,
        window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    )  # fmt: skip
    return o.transpose(1, 2), lse


def _flash_attn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> Grads:
    from flash_attn import flash_attn_interface as library  # pyright: ignore[reportMissingImports]

    grad, q, k, v, o = _rows_first(grad, q, k, v, o)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    library._wrapped_flash_attn_backward(
        grad, q, k, v, o, lse.contiguous(), dq, dk, dv, 0.0, scale, causal=True,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        deterministic=True, rng_state=None,
    )  # fmt: skip
    dq, dk, dv = _rows_first(dq, dk, dv)
    return dq, dk, dv


def _flash_attn_3_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    import flash_attn_interface as library  # pyright: ignore[reportMissingImports]

    o, lse, *_ = library._flash_attn_forward(
        *_rows_first(q, k, v), softmax_scale=scale, causal=True
    )
    return o.transpose(1, 2), lse


def _flash_attn_3_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> Grads:
    import flash_attn_interface as library  # pyright: ignore[reportMissingImports]

    grad, q, k, v, o = _rows_first(grad, q, k, v, o)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    library._flash_attn_backward(
        grad, q, k, v, o, lse.contiguous(), dq=dq, dk=dk, dv=dv, softmax_scale=scale,
        is_causal=True, deterministic=True,
    )  # fmt: skip
    dq, dk, dv = _rows_first(dq, dk, dv)
    return dq, dk, dv


def _groups(q: Tensor, k: Tensor, *others: Tensor) -> Sequence[tuple[Tensor, ...]]:
    """Views of the heads of `q` and the others such that each head has a key/value head alone."""
    grouped = [x.unflatten(1, (k.shape[1], -1)) for x in (q, *others)]
    return [tuple(x[:, :, i] for x in grouped) for i in range(grouped[0].shape[2])]


def _xformers_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from xformers.ops import fmha  # pyright: ignore[reportMissingImports]

    o, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    for heads, to, to_lse in _groups(q, k, o, lse):
        part, part_lse = fmha.memory_efficient_attention_forward_requires_grad(
            *_rows_first(heads, k, v), attn_bias=fmha.LowerTriangularMask(), scale=scale
        )
        to.copy_(part.transpose(1, 2))
        to_lse.copy_(part_lse[:, :, : q.shape[2]])  # some of its kernels pad the rows
    return o, lse


def _xformers_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> Grads:
    from xformers.ops import fmha  # pyright: ignore[reportMissingImports]

    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
    keys, values = _rows_first(k, v)
    for heads, out, total, upstream, to in _groups(q, k, o, lse, grad, dq):
        rows, out, upstream = _rows_first(heads, out, upstream)
        grads = fmha.memory_efficient_attention_backward(
            upstream, out, total.contiguous(), rows, keys, values,
            attn_bias=fmha.LowerTriangularMask(), scale=scale,
        )  # fmt: skip
        for target, part in zip((dk, dv), _rows_first(*grads[1:]), strict=True):
            target += part
        to.copy_(grads[0].transpose(1, 2))
    return dq, dk, dv


_HALF = (torch.float16, torch.bfloat16)

BACKENDS = {
    "sdpa": Backend(None, _HALF, 256, _sdpa_forward, _sdpa_backward),
    "cudnn": Backend(None, _HALF, 128, _cudnn_forward, _cudnn_backward),
    "flash_attn_3": Backend(
        "flash_attn_interface", _HALF, 256, _flash_attn_3_forward, _flash_attn_3_backward, (9, 0)
    ),
    "flash_attn": Backend("flash_attn", _HALF, 256, _flash_attn_forward, _flash_attn_backward),
    "xformers": Backend(
        "xformers", (*_HALF, torch.float32), 256, _xformers_forward, _xformers_backward
    ),
}
_NAMES = {"flash_attn_interface": "flash-attn-3"}  # of packages, where they are called otherwise
HOPPER = (9, 0)


def forward(
    name: str, q: Tensor, k: Tensor, v: Tensor, scale: float, **options: Tensor
) -> tuple[Tensor, Tensor]:
    """As of the backend; heads of values may have any width."""
    inputs = _of_one_width(q, k, v)
    o, lse = BACKENDS[name].forward(*inputs, scale, **options)
    return o[..., : v.shape[-1]], lse


def backward(
    name: str,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    **options: Tensor,
) -> Grads:
    """As of the backend; heads of values may have any width."""
    widths = q.shape[-1], k.shape[-1], v.shape[-1]
    grad, q, k, v, o = _of_one_width(grad, q, k, v, o)
    grads = BACKENDS[name].backward(grad, q, k, v, o, lse, scale, **options)
    dq, dk, dv = (g[..., :width] for g, width in zip(grads, widths, strict=True))
    return dq, dk, dv


def _of_one_width(*tensors: Tensor) -> list[Tensor]:
    """Pads heads with zeros to one width; zeros add nothing to a product."""
    width = max(x.shape[-1] for x in tensors)
    return [F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in tensors]


def obstacle(name: str, q: Tensor, v: Tensor, **options: Tensor | float | None) -> Exception | None:
    """Why the backend cannot run on tensors such as `q` and `v`, as the error to raise.

    None if it can. The options are those of doubled_attention that are more than a causal mask.
    """
    backend = BACKENDS[name]
    label = f"doubled_attention: backend={name!r}"
    if backend.package and not importlib.util.find_spec(backend.package):
        package = _NAMES.get(backend.package, backend.package.replace("_", "-"))
        return ImportError(
            f"{label} needs the package {package}, which is not installed; "
            f"`pip install {package}`, or use backend='sdpa'"
        )
    if name == "sdpa" and q.is_cpu:
        return None
    if q.device.type != "cuda":
        return RuntimeError(
            f"{label} needs tensors on a GPU{' or CPU' if name == 'sdpa' else ''}, got device "
            f"{q.device}; move them, or use impl='reference'"
        )
    if q.dtype not in backend.dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in backend.dtypes)
        return TypeError(
            f"{label} takes {names} on a GPU, got {q.dtype}; convert, or use impl='reference'"
        )
    for letter, x in (("Dk", q), ("Dv", v)):
        width = x.shape[-1]
        if width % 8 or width > backend.max_width:
            return ValueError(
                f"{label} takes {letter} a multiple of 8 up to {backend.max_width} on a GPU, got "
                f"{width}; use impl='reference'"
            )
    given = ", ".join(option for option, value in options.items() if value is not None)
    if given:
        return RuntimeError(
            f"doubled_attention: impl='composed' takes {given} on a CPU only; use impl='triton'"
        )
    if torch.version.hip is None and _capability(q) < backend.capability:
        return RuntimeError(
            f"{label} needs a GPU of compute capability {backend.capability} or more; "
            "use impl='triton'"
        )
    return None


def _capability(q: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(q.device)


def is_fast(name: str, q: Tensor) -> bool:
    """Whether the backend is of FlashAttention 3's class on the GPU of `q`.

    PyTorch's flash attention is after `torch.nn.attention.activate_flash_attention_impl`. cuDNN's
    gradients do not repeat bit for bit, so that it is not where they are asked to.
    """
    if torch.version.hip is not None or _capability(q) < HOPPER:
        return False
    if name == "cudnn":
        return not torch.are_deterministic_algorithms_enabled()
    return name == "flash_attn_3" or (name == "sdpa" and _flash_of_sdpa() in ("FA3", "FA4"))


def _flash_of_sdpa() -> str | None:
    """The implementation that replaces PyTorch's own flash attention, or None."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return None if current is None else current()


def choose(name: str | None, q: Tensor, v: Tensor, **options: Tensor | float | None) -> str:
    """The named backend, or the first that can run, fast ones first; raises if there is none."""
    if name is not None:
        error = obstacle(name, q, v, **options)
        if error is not None:
            raise error
        return name
    if q.is_cpu:
        return "sdpa"  # the only one; looking for packages takes a tenth of a millisecond
    errors = {candidate: obstacle(candidate, q, v, **options) for candidate in BACKENDS}
    able = [candidate for candidate, error in errors.items() if error is None]
    if not able:
        raise next(error for error in errors.values() if error is not None)
    fast = [candidate for candidate in able if not q.is_cpu and is_fast(candidate, q)]
    return (fast or able)[0]
