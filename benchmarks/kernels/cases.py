"""The launches of `make kernels-check`: every kernel, as a large model calls it.

Tensors are on the meta device, so nothing is allocated; their data pointer 0 counts as aligned.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dblocks.ops._dispatch import planned

N, T = 8, 4096
HEADS = 16
CLASSES = 2**16 - 1
CROSS_ENTROPY_AT = 4096  # at one width only, as its kernel has no width


def attention(
    D: int, dtype: torch.dtype, target: str
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Forward and backward of doubled_attention at head width `D`, with the tiles of `target`.

    All options at the widths of most models in bfloat16; otherwise the two forms of the kernels.
    """
    run = functools.partial(attend, D, dtype, target)
    yield "attention", lambda: run()
    yield "attention blocked", lambda: run(block_size=32)
    if D in (64, 128) and dtype == torch.bfloat16:
        yield "attention noisy", lambda: run(noisy_only=True)
        yield "attention blocked noisy", lambda: run(block_size=32, noisy_only=True)
        yield "attention token", lambda: run(block_size=24, token=True)
        yield "attention groups", lambda: run(groups=4)
        yield "attention documents", lambda: run(documents=True)
        yield "attention blocked documents", lambda: run(block_size=24, documents=True)
        yield "attention valid", lambda: run(valid=True, noisy_first=True)
        yield "attention window", lambda: run(window=96)
        yield "attention scores", lambda: run(softcap=30.0, alibi=True)
        yield (
            "attention blocked scores",
            lambda: run(block_size=24, window=96, softcap=30.0, alibi=True, valid=True),
        )
    if D == 128 and dtype == torch.bfloat16:
        yield "attention values", lambda: run(value_width=64)


def attend(
    D: int,
    dtype: torch.dtype,
    target: str,
    *,
    block_size: int = 1,
    token: bool = False,
    noisy_only: bool = False,
    noisy_first: bool = False,
    groups: int = 1,
    documents: bool = False,
    valid: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    alibi: bool = False,
    value_width: int | None = None,
) -> None:
    """Launches the kernels on heads side by side in memory, as in the output of a linear layer."""
    from dblocks.kernels.attention.backward import doubled_attention_bwd
    from dblocks.kernels.attention.forward import doubled_attention_fwd
    from dblocks.kernels.attention.layout import Options, settings

    samples = 1 if documents else N

    def heads(count: int, rows: int, width: int) -> Tensor:
        return torch.empty(samples, rows, count, width, dtype=dtype, device="meta").transpose(1, 2)

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    DV = value_width or D
    q = heads(HEADS, T if noisy_only else 2 * T, D)
    k, v = (heads(HEADS // groups, 2 * T, width) for width in (D, DV))
    options = Options(
        block_size=block_size,
        token=token,
        scale=D**-0.5,
        cu_seqlens=integers(5) if documents else None,
        noisy_only=noisy_only,
        noisy_first=noisy_first,
        valid=integers(samples, 2) if valid else None,
        window=window,
        softcap=softcap,
        alibi_slopes=torch.empty(HEADS, device="meta") if alibi else None,
    )
    tiles = settings(max(D, DV), dtype, target, options.loaded)
    forward = planned(functools.partial(doubled_attention_fwd, tiles=tiles.forward))
    backward = planned(functools.partial(doubled_attention_bwd, tiles=tiles))
    o, lse = forward(q, k, v, *options)
    backward(o, q, k, v, o, lse, *options, [True, True])


def cases(D: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and launch of every case at width `D`; modulations are float32 chunks of [N, 6 D]."""
    x, branch, d1, d2 = (torch.empty(N, T, D, dtype=dtype, device="meta") for _ in range(4))
    per_sample = torch.empty(N, 6 * D, device="meta").chunk(6, -1)[:3]
    per_segment = torch.empty(N, 2, 6 * D, device="meta").chunk(6, -1)[:3]
    per_token = torch.empty(N, T, 6 * D, device="meta", dtype=dtype).chunk(6, -1)[:3]
    affine = (torch.empty(D, device="meta"), torch.empty(D, device="meta"))
    none = (None, None)
    yield "adaln", lambda: norm(x, None, per_sample, none, (None, d2), rms=False)
    yield "adaln rms affine", lambda: norm(x, None, per_segment, affine, (None, d2), rms=True)
    yield "adaln per token", lambda: norm(x, None, per_token, none, (None, d2), rms=False)
    yield "residual_adaln", lambda: norm(x, branch, per_sample, none, (d1, d2), rms=False)
    yield "residual_adaln affine", lambda: norm(x, branch, per_sample, affine, (d1, d2), rms=False)
    yield "gated_residual", lambda: norm(x, branch, per_sample, none, (d1, None), rms=False)
    if D == CROSS_ENTROPY_AT:
        yield "linear_cross_entropy", lambda: cross_entropy_rows(dtype, bias=False)
        yield "linear_cross_entropy bias", lambda: cross_entropy_rows(dtype, bias=True)
    yield from diffusion(D, dtype)


def cross_entropy_rows(dtype: torch.dtype, *, bias: bool) -> None:
    """Losses and gradients of a chunk of logits over an odd number of classes."""
    from dblocks.ops._chunked_cross_entropy import launch_rows

    def padded(dtype: torch.dtype) -> Tensor:
        return torch.empty(T, CLASSES + 1, dtype=dtype, device="meta")[:, :-1]

    target = torch.empty(T, dtype=torch.int64, device="meta")
    losses, added = torch.empty(T, device="meta"), torch.empty(CLASSES, device="meta")
    narrow = None if dtype == torch.float32 else padded(dtype)
    launch_rows(
        padded(torch.float32), added if bias else None, target, losses, narrow,
        in_place=bias or narrow is None,
    )  # fmt: skip


def norm(
    x: Tensor,
    branch: Tensor | None,
    modulation: tuple[Tensor, ...],
    affine: tuple[Tensor | None, Tensor | None],
    upstream: tuple[Tensor | None, Tensor | None],
    *,
    rms: bool,
) -> None:
    """Forward and backward of adaln, residual_adaln or gated_residual."""
    from dblocks.kernels.adaln.backward import adaln_bwd
    from dblocks.kernels.adaln.forward import adaln_fwd

    dx_new, dy = upstream
    gate = modulation[0] if branch is not None else None
    shift, scale = modulation[1:] if dy is not None else (None, None)
    inputs = (branch, gate, shift, scale, *affine)
    normalise = dy is not None
    _, _, mean, rstd = planned(adaln_fwd)(x, *inputs, normalise, rms, 1e-6, x.dtype)
    planned(adaln_bwd)(dy, dx_new, x, *inputs, mean, rstd, rms, [True] * 7)


def diffusion(D: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """The elementwise ops, with sigma per sample and per token."""
    from dblocks.kernels import noise
    from dblocks.kernels.edm import denoise, euler, loss

    y, f = (torch.empty(N, T, D, dtype=dtype, device="meta") for _ in range(2))
    z = torch.empty(N, T, D, device="meta")
    sample, token = torch.empty(N, device="meta"), torch.empty(N, T, device="meta")
    seed = torch.empty((), dtype=torch.int64, device="meta")
    inject, inject_bwd = planned(noise.noise_inject_fwd), planned(noise.noise_inject_bwd)
    denoised, denoised_bwd = planned(denoise.edm_denoise_fwd), planned(denoise.edm_denoise_bwd)
    loss_fwd, loss_bwd = planned(loss.edm_loss_fwd), planned(loss.edm_loss_bwd)
    step, step_bwd = planned(euler.euler_step_fwd), planned(euler.euler_step_bwd)
    yield "noise_inject", lambda: inject(y, sample, None, 1, 0, 0.5, dtype, True)
    yield (
        "noise_inject per token",
        lambda: inject(y, token, seed, 0, 0, 0.5, dtype, False),
    )
    yield "noise_inject backward", lambda: inject_bwd(z, y, sample, 0.5, dtype)
    yield "edm_denoise", lambda: denoised(f, z, sample, 0.5)
    yield (
        "edm_denoise backward",
        lambda: denoised_bwd(z, sample, 0.5, dtype, torch.float32),
    )
    yield "edm_loss", lambda: loss_fwd(f, y, sample, None, 1, 0, 0.5, None, False)
    yield (
        "edm_loss for backward",
        lambda: loss_fwd(f, y, token, seed, 0, 0, 0.5, token, True),
    )
    yield "edm_loss backward", lambda: loss_bwd(sample, f, None, dtype)
    yield "edm_loss backward per token", lambda: loss_bwd(sample, f, token, dtype)
    yield "euler_step", lambda: step(z, z, None, None, 1.0, 0.5)
    yield "euler_step per token", lambda: step(z, z, token, token, 1.0, 0.5)
    yield "euler_step to a number", lambda: step(z, z, sample, None, 1.0, 0.5)
    yield (
        "euler_step backward",
        lambda: step_bwd(z, None, None, 1.0, 0.5, torch.float32, torch.float32),
    )
