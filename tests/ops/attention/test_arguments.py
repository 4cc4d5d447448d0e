"""What doubled_attention refuses."""

import pytest
import torch
from attention_tools import ON_GPU

from dblocks.functional import doubled_attention

Q = torch.zeros(1, 2, 4, 16)
TRITON = {"impl": "triton"}
SLOPES = torch.ones(2)
VALID = torch.tensor([[0, 2]], dtype=torch.int32)
DOCUMENTS = torch.tensor([0, 1, 2], dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "q must be a tensor, got NoneType", {"q": None}),
        (TypeError, "k must be float64, .* got torch.int64", {"k": Q.long()}),
        (TypeError, "v must have the dtype of q, .*32, got .*16", {"v": Q.half()}),
        (RuntimeError, "k must be on cpu .* got meta", {"k": Q.to("meta")}),
        (ValueError, r"q must have shape \[N, heads, rows, Dh\], got \[2, 4, 16\]", {"q": Q[0]}),
        (ValueError, "query must be one of .* got 'clean'", {"query": "clean"}),
        (ValueError, "clean_causal must be one of .* got 'row'", {"clean_causal": "row"}),
        (TypeError, "block_size must be an int, got float", {"block_size": 1.0}),
        (TypeError, "block_size must be an int, got bool", {"block_size": True}),
        (ValueError, "block_size must be at least 1 .*, got 0", {"block_size": 0}),
        (TypeError, "scale must be a real number, got str", {"scale": "1"}),
        (ValueError, r"k and v must have shape .* \[1, Hkv, 2T, 16\] and", {"v": Q[:, :, :2]}),
        (ValueError, "k and v must have shape", {"k": Q[..., :8], "v": Q[..., :8]}),
        (ValueError, "got the odd number 3", {"k": Q[:, :, :3], "v": Q[:, :, :3]}),
        (ValueError, "q must have 4 rows .* query='both', got 2", {"q": Q[:, :, :2]}),
        (ValueError, "q must have 2 rows .* query='noisy', got 4", {"query": "noisy"}),
        (ValueError, "multiple of those of k, got 3 and 2", {"q": torch.zeros(1, 3, 4, 16)}),
        (ValueError, "Dk must be at least 1", dict.fromkeys("qkv", Q[..., :0])),
        (TypeError, "cu_seqlens must be a tensor, got list", {"cu_seqlens": [0, 2]}),
        (TypeError, "cu_seqlens must be int32, got torch.int64", {"cu_seqlens": DOCUMENTS.long()}),
        (RuntimeError, "cu_seqlens must be on cpu", {"cu_seqlens": DOCUMENTS.to("meta")}),
        (ValueError, r"must have shape \[documents \+ 1\]", {"cu_seqlens": DOCUMENTS[:1]}),
        (
            ValueError,
            "cu_seqlens needs N = 1, got N = 2",
            dict.fromkeys("qkv", torch.zeros(2, 2, 4, 16)) | {"cu_seqlens": DOCUMENTS},
        ),
        (ValueError, r"start with 0, .* T = 2, got \[1, 2\]", {"cu_seqlens": DOCUMENTS[1:]}),
        (ValueError, r"end with T = 2, got \[0, 1\]", {"cu_seqlens": DOCUMENTS[:2]}),
        (
            ValueError,
            r"never decrease .* got \[0, 2, 1, 2\]",
            {"cu_seqlens": torch.tensor([0, 2, 1, 2], dtype=torch.int32)},
        ),
        (ValueError, "scale must be from .*, got nan", {"scale": float("nan")}),
        (ValueError, "scale must be from .*, got -inf", {"scale": -float("inf")}),
        (ValueError, "order must be one of .* got 'clean'", {"order": "clean"}),
        (TypeError, "window must be an int, got float", {"window": 2.0}),
        (ValueError, "window must be at least 1 .*, got 0", {"window": 0}),
        (TypeError, "softcap must be a real number, got str", {"softcap": "1"}),
        (ValueError, "softcap must be from .*, got inf", {"softcap": float("inf")}),
        (ValueError, "softcap must be from .*, got 0", {"softcap": 0}),
        (ValueError, "softcap must be from .*, got 1e-300", {"softcap": 1e-300}),
        (ValueError, "window must be at least 1 and at most", {"window": 2**63}),
        (TypeError, "alibi_slopes must be a tensor, got list", {"alibi_slopes": [1.0, 1.0]}),
        (TypeError, "alibi_slopes must be float32, got .*64", {"alibi_slopes": SLOPES.double()}),
        (ValueError, r"\[H\] = \[2\] or \[N, H\] = \[1, 2\], got", {"alibi_slopes": SLOPES[:1]}),
        (RuntimeError, "alibi_slopes must be on cpu", {"alibi_slopes": SLOPES.to("meta")}),
        (ValueError, "must be constants", {"alibi_slopes": SLOPES.clone().requires_grad_()}),
        (ValueError, "Dv must be at least 1, got 0", {"v": Q[..., :0]}),
        (TypeError, "valid must be a tensor, got list", {"valid": [[0, 2]]}),
        (TypeError, "valid must be int32, got torch.int64", {"valid": VALID.long()}),
        (RuntimeError, "valid must be on cpu", {"valid": VALID.to("meta")}),
        (ValueError, r"valid must have shape \[N, 2\] = \[1, 2\], got \[2\]", {"valid": VALID[0]}),
        (ValueError, r"start <= end <= T = 2, got \[\[0, 3\]\]", {"valid": VALID + VALID // 2}),
        (ValueError, r"start <= end <= T = 2, got \[\[2, 0\]\]", {"valid": VALID.flip(1)}),
        (ValueError, r"0 <= start .* got \[\[-1, 1\]\]", {"valid": VALID - 1}),
        (ValueError, "valid must be None with", {"valid": VALID, "cu_seqlens": DOCUMENTS}),
        (ValueError, "impl must be one of auto, .* got 'cpp'", {"impl": "cpp"}),
        (ValueError, "backend must be one of sdpa, .* got 'math'", {"backend": "math"}),
        (TypeError, "impl='triton' .* got float64", dict.fromkeys("qkv", Q.double()) | TRITON),
    ],
)  # fmt: skip
@pytest.mark.skipif(ON_GPU, reason="the same checks, with tensors on the CPU")
def test_bad_arguments(error, message, arguments):
    given = {"q": Q, "k": Q, "v": Q} | arguments
    with pytest.raises(error, match=message):
        doubled_attention(**given)
