"""Problems of doubled_attention, and what an implementation of it must come to."""

import torch
from hypothesis import strategies as st

from dblocks.functional import doubled_attention
from dblocks.kernels import reference
from dblocks.testing import error_budget
from tools import DEVICE

IMPLS = ("composed", "triton")
# Those of IMPLS that are tried with each new option by itself. Of Triton, interpreted slowly,
# tests/kernels/attention does so, in tiles of few rows.
NEW_OPTION_IMPLS = ("composed",)
# A GPU's composition is of 16-bit matrices.
ON_GPU = DEVICE.type == "cuda"
DTYPES = {
    "composed": [torch.float16, torch.bfloat16]
    + ([] if ON_GPU else [torch.float32, torch.float64]),
    "triton": [torch.float16, torch.float32, torch.bfloat16],
}
WIDTHS = {"composed": [8, 16, 64] if ON_GPU else [1, 3, 8, 16, 40], "triton": [16, 24, 32]}
GROWTH = 4  # of a rounding in sums and exponentials


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@st.composite
def problems(draw, impl, max_rows=40, extra=False):
    """The inputs q, k, v; the upstream gradient; the options, all of them if `extra`."""
    dtype = draw(st.sampled_from(DTYPES[impl]))
    N, T = draw(st.sampled_from([1, 1, 2])), draw(st.integers(1, max_rows))
    heads, group = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3]))
    width = draw(st.sampled_from(WIDTHS[impl]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    query = draw(st.sampled_from(["both", "noisy"]))
    rows = T if query == "noisy" else 2 * T
    cu_seqlens = None
    if N == 1 and not (impl == "composed" and ON_GPU) and draw(st.booleans()):
        cuts = draw(st.lists(st.integers(0, T), max_size=3))
        cu_seqlens = torch.tensor([0, *sorted(cuts), T], dtype=torch.int32, device=DEVICE)

    def tensor(heads, rows, width=width):
        layout = draw(st.sampled_from(["contiguous", "qkv", "expanded", "transposed"]))
        size = {"expanded": (1, heads, rows, width), "qkv": (N, rows, 3, heads, width)}
        size |= {"transposed": (N, heads, width, rows)}
        x = torch.randn(size.get(layout, (N, heads, rows, width)), generator=generator)
        x = x.to(DEVICE, dtype)
        views = {"expanded": lambda: x.expand(N, -1, -1, -1), "transposed": lambda: x.mT}
        views |= {"qkv": lambda: x[:, :, 1].transpose(1, 2)}
        return views.get(layout, lambda: x)()

    options = {
        "block_size": draw(st.sampled_from([1, 1, 2, 3, 4, 7, 16, 50])),
        "clean_causal": draw(st.sampled_from(["block", "token"])),
        "scale": draw(st.sampled_from([None, 0.3, 2.0])),
        "cu_seqlens": cu_seqlens,
        "query": query,
    }
    H, v_width = heads * group, width
    if extra:
        options |= draw(extras(N, H, T, cu_seqlens is None))
        v_width = draw(st.sampled_from(WIDTHS[impl]))
    inputs = tensor(H, rows), tensor(heads, 2 * T), tensor(heads, 2 * T, v_width)
    return inputs, tensor(H, rows, v_width), options


@st.composite
def extras(draw, N, H, T, padded):
    """The options that not every layer needs, each of them half of the time."""
    half = lambda strategy: draw(st.none() | strategy)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ranges = st.lists(st.tuples(st.integers(0, T), st.integers(0, T)), min_size=N, max_size=N)
    valid = half(ranges) if padded else None
    if valid is not None:
        valid = torch.tensor([sorted(r) for r in valid], dtype=torch.int32, device=DEVICE)
    shape = half(st.sampled_from([(H,), (N, H)]))
    slopes = None if shape is None else torch.rand(shape, generator=generator).to(DEVICE)
    return {
        "scale": draw(st.sampled_from([None, 0.3, -0.3, 0.0])),
        "order": draw(st.sampled_from(["clean_noisy", "noisy_clean"])),
        "valid": valid,
        "window": half(st.sampled_from([1, 2, 5, 17, 100])),
        "softcap": half(st.sampled_from([0.5, 4.0])),
        "alibi_slopes": slopes,
    }


def run(impl, inputs, upstream, options, dtype=None):
    """o and the gradients of q, k and v."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    o = doubled_attention(*leaves, impl=impl, **options)
    return [o.detach(), *torch.autograd.grad(o, leaves, upstream.to(o.dtype))]


def magnitudes(inputs, upstream, options):
    """o and the gradients with every term taken positive, and the largest score."""
    q, k, v, grad = (x.double() for x in (*inputs, upstream))
    T, group = k.shape[2] // 2, q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    names = ("block_size", "clean_causal", "cu_seqlens", "order", "valid", "window")
    given = {n: options[n] for n in names if n in options}
    mask = reference.doubled_mask(T, **given, device=q.device).unsqueeze(-3)
    last = options.get("order") != "noisy_clean"
    rows = slice(T * last, T + T * last) if options["query"] == "noisy" else slice(None)
    mask, scale = mask[..., rows, :], options["scale"]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q @ k.mT * scale
    if softcap := options.get("softcap"):
        scores = softcap * torch.tanh(scores / softcap)
    if (slopes := options.get("alibi_slopes")) is not None:
        i = torch.arange(T, device=q.device).repeat(2)
        scores = scores - slopes[..., None, None] * (i[rows, None] - i).abs()
    p = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0)
    scores, scale = scores.where(mask, 0), abs(scale)
    q, k, v, grad = (x.abs() for x in (q, k, v, grad))
    o = p @ v
    ds = p * scale * (grad @ v.mT + (grad * o).sum(-1, keepdim=True))
    summed = (x.unflatten(1, (-1, group)).sum(2) for x in (ds.mT @ q, p.mT @ grad))
    return [o, ds @ k, *summed], scores.abs().max().item()


def check(impl, inputs, upstream, options):
    """Within the budget around float64, and the rounding of what flash attention computes.

    Its backward takes exp(score - lse), with a relative error of eps |score|, and the difference of
    two sums, grad . v - grad . o, which may cancel: softmax's own backward is exactly 0 for a row
    with one key. Triton's matrix products take o and the probabilities in the dtype of q.
    """
    dtype = inputs[0].dtype
    got = run(impl, inputs, upstream, options)
    ref64 = run("reference", inputs, upstream, options, torch.float64)
    eager = run("reference", inputs, upstream, options)
    terms, score = magnitudes(inputs, upstream, options)
    eps = torch.finfo(wide(dtype) if impl == "composed" and not ON_GPU else dtype).eps
    eps += score * torch.finfo(wide(dtype)).eps
    for name, g, r, e, m in zip("oqkv", got, ref64, eager, terms, strict=True):
        assert g.shape == r.shape
        assert g.dtype == dtype
        error = (g.double() - r).abs().max().item()
        budget = error_budget(r, e, dtype) + GROWTH * eps * m.max().item()
        assert error <= budget, f"{impl}, {name}: error {error:.3e} is over {budget:.3e}"


def tensors(N=1, H=2, heads=2, T=6, width=16, rows=None, dtype=torch.float32):
    """Normal q, k, v."""
    make = lambda *shape: torch.randn(shape, device=DEVICE).to(dtype)
    return make(N, H, rows or 2 * T, width), *(make(N, heads, 2 * T, width) for _ in range(2))


def composed_dtype():
    return torch.float16 if ON_GPU else torch.float32
