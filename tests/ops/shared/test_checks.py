"""What arguments that fit look like is remembered: for so many only, and for those alone."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dblocks.functional import adaln, edm_denoise, gated_residual
from dblocks.ops import _dispatch


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(_dispatch, "MAX_FITTING", 3)
    _dispatch._fitting.clear()
    for T in range(1, 8):
        assert adaln(torch.randn(1, T, 4), None, None).shape == (1, T, 4)
        assert len(_dispatch._fitting) <= 3


def test_it_is_of_these_arguments_alone():
    x, m, p = torch.randn(2, 2, 2), torch.randn(2, 2), torch.randn(2)
    gated_residual(x, x, m)
    adaln(x, m, m, weight=p, bias=p)
    for _ in range(2):
        with pytest.raises(ValueError, match="branch must have the shape of x"):
            gated_residual(x, m, None)
        with pytest.raises(ValueError, match="shift must have shape"):
            adaln(x, p, None)
        with pytest.raises(ValueError, match="weight must have shape"):
            adaln(x, None, None, weight=m)
        with pytest.raises(TypeError, match="x must be float64, float32"):
            adaln(x.int(), m, m, weight=p, bias=p)
        with pytest.raises(TypeError, match="x must be a dense tensor"):
            adaln(x.to_sparse(), m, m, weight=p, bias=p)
        with pytest.raises(RuntimeError, match="scale must be on cpu"):
            adaln(x, m, m.to("meta"), weight=p, bias=p)
        with pytest.raises(ValueError, match="z must have the shape of f"):
            edm_denoise(x, m, torch.ones(2))


def test_threads_share_it():
    _dispatch._fitting.clear()

    def run(seed):
        x, m = torch.randn(1 + seed % 3, 2 + seed % 5, 4), torch.randn(1 + seed % 3, 4)
        torch.testing.assert_close(gated_residual(x, x, m), x + m[:, None] * x)

    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(run, range(200)))) == 200
    assert len(_dispatch._fitting) == 15
