"""Under autocast each tensor of an op may have another dtype than the others."""

import pytest
import torch
from op_tools import OPS, PLAIN, arguments, total

from tools import DEVICE


@pytest.mark.parametrize(
    ("op", "name"),
    [(op, name) for op, (_, names) in OPS.items() for name in names if name not in PLAIN],
)
def test_one_tensor_of_another_dtype(op, name):
    call, names = OPS[op]
    for others in (torch.float32, torch.bfloat16):
        own = torch.bfloat16 if others == torch.float32 else torch.float32
        exact = arguments(op)
        given = {
            n: exact[n] if n in PLAIN else x.detach().to(own if n == name else others)
            for n, x in exact.items()
        }
        for n, x in given.items():
            x.requires_grad_(exact[n].requires_grad)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            found = total(call(**given, impl="auto"))
        expected = total(call(**exact, impl="auto"))
        torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.5)
        found.backward()
        for n in names:
            assert not exact[n].requires_grad or given[n].grad.dtype == given[n].dtype
