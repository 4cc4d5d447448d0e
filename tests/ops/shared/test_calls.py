"""The files that a call of an op passes, at most three: its own, the dispatch, the implementation.

Counted is Python that runs on the host, in the library, for a layout of arguments that is known. A
kernel's own code is compiled, so it is not run here. Not counted are the checks: they run for a new
layout, or where a call must look at values of a tensor.
"""

import pytest
import torch
from call_tools import calls_of, circles, files_of
from op_tools import IMPLS, OPS, arguments, total

from dblocks.functional import doubled_attention
from dblocks.ops import FAMILIES, _dispatch
from dblocks.testing import LAYOUTS, make
from tools import DEVICE, FUSED, NO_CPP

CHECKS = {"ops/_checks.py", "ops/_levels.py", "ops/_attention/checks.py"}
CASES = [
    pytest.param(op, *getattr(impl, "values", [impl]), marks=getattr(impl, "marks", ()))
    for op in OPS
    for impl in ("reference", *IMPLS.get(op, FUSED))
]
INT32 = {"dtype": torch.int32, "device": DEVICE}
ATTENTIONS = {
    "blocks": {"block_size": 2},
    "window": {"window": 2},
    "softcap": {"softcap": 3.0},
    "documents": {"cu_seqlens": torch.tensor([0, 1, 4], **INT32)},
    "valid": {"valid": torch.tensor([[0, 3]], **INT32)},
    "slopes": {"alibi_slopes": torch.ones(2, device=DEVICE)},
}
# Beyond composed.py of "composed": the attentions of PyTorch and other libraries and, on a CPU with
# these options, what it computes in chunks.
BACKENDS, CHUNKS = "ops/_attention/backends.py", "ops/_attention/chunks.py"
CHUNKED = {"blocks", "window", "softcap", "slopes"}


@pytest.fixture(autouse=True)
def no_kernel_runs(monkeypatch):
    """Nor is any plan kept that starts none."""
    monkeypatch.setattr(_dispatch, "_plans", {})
    if DEVICE.type == "cuda" or not _dispatch.HAS_TRITON:
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction

    from dblocks.kernels.cross_entropy import rows_launch

    launch = lambda self, grid: lambda *args, **kwargs: None
    monkeypatch.setattr(InterpretedFunction, "__getitem__", launch)
    rows_launch.cache_clear()
    yield
    rows_launch.cache_clear()


def calls(call, tensors, impl):
    """Of the forward and of the backward, of a layout that is new and of one that is known."""
    found = []
    _dispatch._fitting.clear()
    _dispatch._plans.clear()
    for _ in range(2):
        out = []
        found.append(calls_of(lambda out=out: out.append(call(**tensors, impl=impl))))
        loss = total(out[0])
        found.append(calls_of(loss.backward) if loss.requires_grad else set())
    return found


def implementation(files, op):
    """What is left of the files of a call of an op."""
    return files - CHECKS - {f"ops/{op}.py", "ops/_dispatch.py"}


@pytest.mark.parametrize(("op", "impl"), CASES)
def test_a_call_passes_the_op_the_dispatch_and_the_implementation(op, impl):
    *new, forward, backward = calls(OPS[op][0], arguments(op), impl)
    name, family = op.split(",")[0], FAMILIES[op.split(",")[0]]
    for part in (forward, backward):
        used = implementation(files_of(part), name)
        assert len(used - {BACKENDS}) <= 1, used
        if impl == "cpp":
            assert not used
        elif impl == "reference":
            assert all(file.startswith("kernels/reference/") for file in used)
        else:
            own = (f"kernels/{family}", f"ops/_{family}/", f"ops/_chunked_{family}")
            assert all(file.startswith(own) for file in used), used
    assert f"ops/{name}.py" in files_of(forward)
    assert impl == "cpp" or implementation(files_of(forward), name)
    for part in (*new, forward, backward):
        assert not circles(part)


@pytest.mark.parametrize("option", ATTENTIONS)
@pytest.mark.parametrize("impl", ["reference", "triton", "composed"])
def test_attention_with_options(impl, option):
    call = lambda impl, **tensors: doubled_attention(**tensors, **ATTENTIONS[option], impl=impl)
    if impl == "composed" and DEVICE.type == "cuda" and option != "blocks":
        pytest.skip("not on a GPU")
    *new, forward, backward = calls(call, arguments("doubled_attention"), impl)
    more = {BACKENDS, *([CHUNKS] if option in CHUNKED else [])} if impl == "composed" else set()
    for part in (forward, backward):
        used = implementation(files_of(part), "doubled_attention")
        assert len(used - more) <= 1, used
    for part in (*new, forward, backward):
        assert not circles(part)


@pytest.mark.skipif(bool(NO_CPP), reason=f"C++ ops: {NO_CPP}")
def test_checks_run_once_for_a_layout():
    new, _, again, _ = calls(OPS["edm_loss"][0], arguments("edm_loss"), "cpp")
    assert CHECKS & files_of(new)
    assert not CHECKS & files_of(again)
    assert len(files_of(again)) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_that_are_copied(layout):
    """A last stride other than 1 costs a copy, and no other file."""
    tensors = {
        name: make(t.shape, layout, t.dtype, torch.Generator().manual_seed(0), device=DEVICE)
        for name, t in arguments("residual_adaln").items()
    }
    *_, forward, _ = calls(OPS["residual_adaln"][0], tensors, "triton")
    assert len(files_of(forward)) == 3


def test_a_circle_would_be_found():
    assert circles({(None, "a"), ("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")}) == {"a", "b", "c"}
    assert not circles({(None, "a"), ("a", "a"), ("a", "b"), ("a", "c"), ("b", "c")})
