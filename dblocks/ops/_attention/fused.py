"""The Triton kernels of doubled_attention as its implementation, and the sizes that they take."""

from torch import Tensor

MIN_WIDTH, MAX_WIDTH = 16, 256  # of a tile: matrix instructions, registers
WIDTH_STEP = 8  # 16 bytes of a 16-bit dtype
MAX_BLOCK_SIZE = 128
MAX_TOKENS = 2**30 - 2**8  # rows of both halves have int32 numbers, and a tile may pass the last


def forward(q, k, v, *options):
    """o and lse; `options` are those of the op, whose last one is for the composed attention."""
    from dblocks.kernels.attention.forward import doubled_attention_fwd
    from dblocks.kernels.attention.layout import Options

    return doubled_attention_fwd(q, k, v, Options(*options[:-1]))


def backward(do, q, k, v, o, lse, *options_and_needs):
    """dq, dk and dv, None where not needed."""
    from dblocks.kernels.attention.backward import doubled_attention_bwd
    from dblocks.kernels.attention.layout import Options

    *options, _, needs = options_and_needs
    return doubled_attention_bwd(do, q, k, v, o, lse, Options(*options), needs)


def check_sizes(q: Tensor, k: Tensor, v: Tensor, block_size: int) -> None:
    """Raises if the kernels do not take these sizes."""
    if reason := obstacle(q, k, v, block_size):
        raise ValueError(
            f"doubled_attention: impl='triton' takes {reason}; "
            "use impl='composed' or impl='reference'"
        )


def obstacle(q: Tensor, k: Tensor, v: Tensor, block_size: int) -> str | None:
    """What the kernels take instead of these sizes; None where they take them."""
    for name, width in {"Dh": q.shape[-1], "Dv": v.shape[-1]}.items():
        if not MIN_WIDTH <= width <= MAX_WIDTH or width % WIDTH_STEP:
            return f"{name} a multiple of {WIDTH_STEP} from {MIN_WIDTH} to {MAX_WIDTH}, got {width}"
    if block_size > MAX_BLOCK_SIZE:
        return f"block_size <= {MAX_BLOCK_SIZE}, got {block_size}"
    if (T := k.shape[2] // 2) > MAX_TOKENS:
        return f"T <= {MAX_TOKENS}, got {T}"
    return None
