import pytest
import torch

from dblocks.ops.linear_cross_entropy import linear_cross_entropy

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMPLS = ("reference", "chunked", "triton")


@pytest.mark.skipif(DEVICE.type != "cpu", reason="values are looked at on a CPU")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wrong", [-1, 7, -101])
def test_a_target_that_is_no_class(impl, wrong):
    h, weight = torch.randn(10, 6), torch.randn(7, 6)
    target = torch.randint(0, 7, (10,))
    target[5] = wrong
    message = rf"target must be in \[0, V\) = \[0, 7\) or ignore_index, got {wrong}; check"
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(h, weight, target, impl=impl)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"h": torch.ones(2, 3, 5)}, ValueError, r"weight must have shape \[V, D\] = \[V, 5\]"),
        ({"h": torch.ones(())}, ValueError, r"h must have shape \[..., D\], got a 0-d tensor"),
        ({"h": None}, TypeError, "h must be a tensor, got NoneType"),
        ({"h": torch.ones(2, 3, 4).int()}, TypeError, "h must be float64, float32"),
        ({"weight": torch.ones(0, 4)}, ValueError, r"with V >= 1, got \[0, 4\]"),
        ({"weight": torch.ones(7, 4, 1)}, ValueError, r"weight must have shape \[V, D\]"),
        ({"weight": torch.ones(7, 4, device="meta")}, RuntimeError, "weight must be on"),
        ({"bias": torch.ones(6)}, ValueError, r"bias must have shape \[V\] = \[7\], got \[6\]"),
        ({"bias": torch.ones(7).int()}, TypeError, "bias must be float64"),
        ({"target": torch.ones(2, 3).int()}, TypeError, r"target must be int64, got torch.int32"),
        ({"target": [1]}, TypeError, "target must be a tensor, got list"),
        (
            {"target": torch.ones(3, 2).long()},
            ValueError,
            r"target must have the leading shape of h, \[2, 3\], got \[3, 2\]",
        ),
        ({"row_weight": torch.ones(2)}, ValueError, "row_weight must have the leading shape of h"),
        ({"row_weight": torch.ones(2, 3).int()}, TypeError, "row_weight must be float64"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index must be an int, got float"),
        ({"reduction": "sum"}, ValueError, "reduction must be one of"),
        ({"impl": "cpp"}, ValueError, "impl must be one of auto, reference, chunked, triton"),
        ({"h": torch.ones(2, 3, 4).double(), "impl": "triton"}, TypeError, "got float64"),
    ],
)
def test_errors(change, error, message):
    arguments = {
        "h": torch.ones(2, 3, 4), "weight": torch.ones(7, 4), "target": torch.ones(2, 3).long(),
    } | change  # fmt: skip
    arguments = {
        k: v.to(DEVICE) if isinstance(v, torch.Tensor) and not v.is_meta else v
        for k, v in arguments.items()
    }
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments)


def test_more_classes_than_the_triton_kernel_numbers():
    h = torch.empty(1, 1, device=DEVICE)
    weight = torch.empty(1, 1, device=DEVICE).expand(2**31, 1)
    with pytest.raises(ValueError, match="takes V <= 2147475456, got 2147483648"):
        linear_cross_entropy(h, weight, torch.zeros(1, device=DEVICE).long(), impl="triton")
