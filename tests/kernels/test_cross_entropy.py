import pytest
import torch

from dblocks.ops._chunked_cross_entropy import launch_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("V", [1, 7, 2048, 4099, 6144])
def test_lanes_of_every_size_of_logit(V):
    """Lanes that meet no finite logit, whose first is the largest, and whose last is."""
    g = torch.Generator().manual_seed(V)
    logits = torch.randn(6, V, generator=g) * torch.tensor([1.0, 30, 1e3, 1, 1, 1])[:, None]
    logits[3, : V // 2] = -torch.inf
    logits[4] += torch.linspace(-300, 300, V)
    logits[5] += torch.linspace(300, -300, V)
    target = torch.tensor([0, V // 2, V - 1, V - 1, V - 1, 0])
    expected = torch.nn.functional.cross_entropy(logits.double(), target, reduction="none")
    softmax = logits.double().softmax(1)
    softmax[torch.arange(6), target] -= 1
    losses, grad = torch.empty(6, device=DEVICE), torch.empty(6, V, device=DEVICE)
    launch_rows(logits.to(DEVICE), None, target.to(DEVICE), losses, grad, False)
    torch.testing.assert_close(losses.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.cpu().double(), softmax, rtol=1e-4, atol=1e-6)


def test_a_row_with_nan_has_no_finite_loss():
    logits = torch.zeros(2, 3000)
    logits[1, 2500] = torch.nan
    losses, target = torch.empty(2, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    launch_rows(logits.to(DEVICE), None, target, losses, None, False)
    assert losses[0].isfinite()
    assert losses[1].isnan()
