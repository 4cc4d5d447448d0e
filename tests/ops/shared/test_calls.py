"""The files that a call of an op passes: its own, the dispatch, the implementation.

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
from tools import DEVICE, FUSED, NO_CPP

CHECKS = {"ops/_checks.py", "ops/_levels.py", "ops/_attention/checks.py"}
# What all launches share, and all of elementwise kernels.
COMMON = {"kernels/_common/launches.py", "kernels/_common/runs.py"}
CASES = [
    pytest.param(op, *getattr(impl, "values", [impl]), marks=getattr(impl, "marks", ()))
    for op in OPS
    for impl in ("reference", *IMPLS.get(op, FUSED))
]
# Files of an implementation beyond one: the reasons stand in DESIGN.md.
MORE = {
    ("adaln", "triton"): 1,  # group_grads.py, when a launch of the backward is planned
    ("residual_adaln", "triton"): 1,
    ("edm_denoise", "triton"): 1,  # mix.py, the kernel of both
    ("euler_step", "triton"): 1,
    ("linear_cross_entropy", "triton"): 1,  # the rows' kernel in the loop over chunks
    ("linear_cross_entropy, rows", "triton"): 1,
    ("doubled_attention", "triton"): 3,  # layout.py, segments.py; dkv.py in the backward
    ("doubled_attention", "composed"): 1,  # backends.py: another library's attention
}
INT32 = {"dtype": torch.int32, "device": DEVICE}
ATTENTIONS = {
    "blocks": {"block_size": 2},
    "window": {"window": 2},
    "softcap": {"softcap": 3.0},
    "documents": {"cu_seqlens": torch.tensor([0, 1, 4], **INT32)},
    "valid": {"valid": torch.tensor([[0, 3]], **INT32)},
    "slopes": {"alibi_slopes": torch.ones(2, device=DEVICE)},
}
CHUNKED = {"blocks", "window", "softcap", "slopes"}  # of "composed", on a CPU


@pytest.fixture(autouse=True)
def no_kernel_runs(monkeypatch):
    if DEVICE.type == "cpu" and _dispatch.HAS_TRITON:
        from triton.runtime.interpreter import InterpretedFunction

        launch = lambda self, grid: lambda *args, **kwargs: None
        monkeypatch.setattr(InterpretedFunction, "__getitem__", launch)


def calls(call, tensors, impl):
    """Of the forward and of the backward, of a layout that is new and of one that is known."""
    found = []
    _dispatch._fitting.clear()
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
        assert len(used - COMMON) <= 1 + MORE.get((op, impl), 0), used
        if impl == "cpp":
            assert not used
        elif impl == "reference":
            assert all(file.startswith("kernels/reference/") for file in used)
        else:
            own = (f"kernels/{family}", f"ops/_{family}/", f"ops/_chunked_{family}")
            assert all(file.startswith(own) for file in used - COMMON), used
    assert f"ops/{name}.py" in files_of(forward)
    for part in (*new, forward, backward):
        assert not circles(part)


@pytest.mark.parametrize("option", ATTENTIONS)
@pytest.mark.parametrize("impl", ["reference", "triton", "composed"])
def test_attention_with_options(impl, option):
    call = lambda impl, **tensors: doubled_attention(**tensors, **ATTENTIONS[option], impl=impl)
    if impl == "composed" and DEVICE.type == "cuda" and option != "blocks":
        pytest.skip("not on a GPU")
    *new, forward, backward = calls(call, arguments("doubled_attention"), impl)
    more = MORE.get(("doubled_attention", impl), 0) + (impl == "composed" and option in CHUNKED)
    for part in (forward, backward):
        used = implementation(files_of(part), "doubled_attention") - COMMON
        assert len(used) <= 1 + more, used
    for part in (*new, forward, backward):
        assert not circles(part)


@pytest.mark.skipif(bool(NO_CPP), reason=f"C++ ops: {NO_CPP}")
def test_checks_run_once_for_a_layout():
    new, _, again, _ = calls(OPS["edm_loss"][0], arguments("edm_loss"), "cpp")
    assert CHECKS & files_of(new)
    assert not CHECKS & files_of(again)
    assert len(files_of(again)) == 2


def test_a_circle_would_be_found():
    assert circles({(None, "a"), ("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")}) == {"a", "b", "c"}
    assert not circles({(None, "a"), ("a", "a"), ("a", "b"), ("a", "c"), ("b", "c")})
