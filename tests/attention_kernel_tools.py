"""The kernels of doubled_attention in small tiles, and what they must come to."""

from functools import partial

import torch
from hypothesis import strategies as st

from dblocks.kernels import reference
from dblocks.kernels.attention.backward import doubled_attention_bwd
from dblocks.kernels.attention.forward import doubled_attention_fwd
from dblocks.kernels.attention.layout import Options, Settings, Tiles
from dblocks.ops._dispatch import planned
from dblocks.testing import LAYOUTS, make
from tools import DEVICE

SMALL = Settings(Tiles(32, 16, 4, 1), Tiles(32, 16, 4, 1), Tiles(16, 16, 4, 1))
TALL = Settings(Tiles(16, 32, 4, 1), Tiles(16, 32, 4, 1), Tiles(32, 32, 4, 1))
PLAIN = {"block_size": 1, "token": False, "scale": 0.25}


def forward(q, k, v, options, tiles=SMALL):
    plan = partial(doubled_attention_fwd, tiles=tiles and tiles.forward)
    return planned(plan)(q, k, v, *Options(**options))


def backward(do, q, k, v, o, lse, options, tiles=SMALL):
    inputs = (do, q, k, v, o, lse, *Options(**options), [True, True])
    return planned(partial(doubled_attention_bwd, tiles=tiles))(*inputs)


def gradients(do, q, k, v, options, tiles=SMALL):
    return backward(do, q, k, v, *forward(q, k, v, options, tiles), options, tiles)


def arguments(options):
    """Of the reference, but for those of the queries."""
    o = Options(**options)
    return {
        "block_size": o.block_size,
        "clean_causal": "token" if o.token else "block",
        "order": "noisy_clean" if o.noisy_first else "clean_noisy",
        "cu_seqlens": o.cu_seqlens,
        "valid": o.valid,
        "window": o.window,
    }


def expected(q, k, v, options):
    o = Options(**options)
    return reference.doubled_attention(
        q, k, v, **arguments(options), scale=o.scale, softcap=o.softcap,
        alibi_slopes=o.alibi_slopes, query="noisy" if o.noisy_only else "both",
    )  # fmt: skip


def expected_gradients(do, q, k, v, options):
    """In float64, and in float32 with what enters a matrix product or is stored rounded."""
    leaves = [x.double().detach().requires_grad_() for x in (q, k, v)]
    ref64 = torch.autograd.grad(expected(*leaves, options)[0], leaves, do.double())
    o, T, group = Options(**options), k.shape[2] // 2, q.shape[1] // k.shape[1]
    round_ = lambda x: x.to(q.dtype).float()
    keys, values = (x.float().repeat_interleave(group, 1) for x in (k, v))
    scores = q.float() @ keys.mT * o.scale
    slope = 1.0
    if o.softcap is not None:
        scores = o.softcap * torch.tanh(scores / o.softcap)
        slope = 1 - (scores / o.softcap).square()
    if o.alibi_slopes is not None:
        at = torch.arange(T, device=DEVICE).repeat(2)
        distance = (at[: q.shape[2], None] - at).abs()
        scores = scores - o.alibi_slopes[..., None, None] * distance
    seen = mask(T, options).unsqueeze(-3)
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1).where(seen, 0)
    delta = (do.float() * round_(round_(p) @ values)).sum(-1, keepdim=True)
    ds = round_(p * (do.float() @ values.mT - delta) * slope)
    dk, dv = ds.mT @ q.float() * o.scale, round_(p).mT @ do.float()
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
    return ref64, [x.to(q.dtype) for x in (ds @ keys * o.scale, dk, dv)]


def documents(*ends):
    return torch.tensor([0, *ends], dtype=torch.int32, device=DEVICE)


def ranges(*limits):
    return torch.tensor(limits, dtype=torch.int32, device=DEVICE)


def noisy_rows(T, options):
    """Of both halves."""
    return slice(0, T) if options.get("noisy_first") else slice(T, 2 * T)


def mask(T, options):
    rows = reference.doubled_mask(T, **arguments(options), device=DEVICE)
    return rows[..., noisy_rows(T, options), :] if options.get("noisy_only") else rows


@st.composite
def problems(draw):
    T = draw(st.integers(1, 36))
    heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3)]))
    kind = draw(st.sampled_from(["whole", "packed", "padded"]))
    N = 1 if kind == "packed" else draw(st.sampled_from([1, 2]))
    limits = st.lists(st.integers(0, T), min_size=2, max_size=2).map(sorted)
    D, DV = draw(st.sampled_from([(16, 16), (24, 24), (40, 40), (32, 16), (16, 40)]))
    options = {
        "block_size": draw(st.one_of(st.just(1), st.sampled_from([2, 3, 8, 16, 21, 128]))),
        "token": draw(st.booleans()),
        "scale": draw(st.sampled_from([D**-0.5, 0.7, -0.2, 0.0])),
        "noisy_only": draw(st.booleans()),
        "noisy_first": draw(st.booleans()),
        "window": draw(st.sampled_from([None, None, 1, 3, 10, 40])),
        "softcap": draw(st.sampled_from([None, None, 0.5, 20.0])),
    }
    if kind == "packed":
        options["cu_seqlens"] = documents(*sorted(draw(st.lists(st.integers(0, T)))), T)
    if kind == "padded":
        options["valid"] = ranges(*(draw(limits) for _ in range(N)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(heads * group,), (N, heads * group)]))
        options["alibi_slopes"] = torch.rand(shape, generator=generator).to(DEVICE)
    dtype = draw(st.sampled_from([torch.float32, torch.float16]))

    def tensor(count, rows, width):
        layout = draw(st.sampled_from(LAYOUTS))
        if draw(st.booleans()):
            by_rows = make((N, rows, count, width), layout, dtype, generator, device=DEVICE)
            return by_rows.transpose(1, 2)
        return make((N, count, rows, width), layout, dtype, generator, device=DEVICE)

    rows = T if options.get("noisy_only") else 2 * T
    q, do = (tensor(heads * group, rows, width) for width in (D, DV))
    k, v = (tensor(heads, 2 * T, width) for width in (D, DV))
    return do, q, k, v, options
