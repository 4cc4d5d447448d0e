"""The MLPs of a transformer layer.

Linear layers start as in DiT and in ViT's JAX code: Xavier uniform weights, zero biases.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch.nn.functional as nnf
from torch import Tensor, nn

from dblocks.nn.init import init_linear_


class MLP(nn.Module):
    """`Linear(GELU(Linear(x)))`.

    Args:
        dim: width D.
        hidden_dim: width between the two layers.
        bias: the linear layers have biases.
        approximate: "none", or "tanh" for the approximation of GELU.
    """

    def __init__(
        self, dim: int, hidden_dim: int, *, bias: bool = True, approximate: str = "none"
    ) -> None:
        super().__init__()
        self.approximate = approximate
        self.fc1 = nn.Linear(dim, hidden_dim, bias=bias)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias)
        self.apply(init_linear_)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the two layers to the last dimension of `x`."""
        return self.fc2(nnf.gelu(self.fc1(x), approximate=self.approximate))


class SwiGLU(nn.Module):
    """`Linear(SiLU(a)*b)`, where a and b are the halves of `Linear(x)`.

    Args:
        dim: width D.
        hidden_dim: width of a and of b.
        bias: the linear layers have biases.

    Source: Shazeer 2020.
    """

    def __init__(self, dim: int, hidden_dim: int, *, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden_dim, bias=bias)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias)
        self.apply(init_linear_)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the two layers to the last dimension of `x`."""
        a, b = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(nnf.silu(a) * b)


MLPKind = Literal["gelu", "gelu_tanh", "swiglu"]
MLPS = {"gelu": MLP, "gelu_tanh": partial(MLP, approximate="tanh"), "swiglu": SwiGLU}
