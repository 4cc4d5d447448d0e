import os

import torch

# Before any kernel is imported: without a GPU the kernels run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import HealthCheck, settings

_COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("ci", max_examples=50, derandomize=True, **_COMMON)
settings.register_profile("thorough", max_examples=10_000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def _round_like_hardware() -> None:
    """Makes the interpreter round float32 to bfloat16 to the nearest, as every GPU does.

    Triton 3.6 to 3.9 cut the low bits off instead, twice the error that the budgets allow for.
    """
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_float(values, source, target, rounding_mode):
        if source.is_fp32() and target.is_bf16():
            rounded = torch.from_numpy(values.astype("float32")).bfloat16()
            return rounded.view(torch.uint16).numpy()
        return convert(values, source, target, rounding_mode)

    interpreter._convert_float = convert_float


def _patch_once() -> None:
    """Spares the interpreter to patch the language again for each call of our device functions.

    The launch of the kernel has done so, and each time costs about a millisecond.
    """
    from triton.runtime.interpreter import InterpretedFunction

    patching, patched = InterpretedFunction.__call__, set()

    def call(self, *args, **kwargs):
        # Triton's own functions see another module of the language, which stays patched.
        if self.fn.__module__.startswith("triton.") and self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            return patching(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call


if os.environ.get("TRITON_INTERPRET") == "1":
    _round_like_hardware()
    _patch_once()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    """What is kept between runs is not kept between those of the tests."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DBLOCKS_CACHE", str(tmp_path_factory.mktemp("kept")))
        yield


@pytest.fixture(scope="module")
def one_thread():
    """Threads that wait for each other make small steps slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
