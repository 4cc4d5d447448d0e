"""Loads the C++ ops for CPUs, where they are built: importing `dblocks._C` registers them."""

import importlib
import importlib.util
import warnings

NOT_BUILT = "not built"


def _load() -> str:
    """Why the ops cannot run; empty where they can."""
    if importlib.util.find_spec("dblocks._C") is None:
        return NOT_BUILT
    try:
        importlib.import_module("dblocks._C")
    except (ImportError, OSError) as error:
        warnings.warn(
            f"the C++ ops for CPUs are built, but do not load: {error}; every op on a CPU uses the "
            "reference. Build them again for the torch that is installed: pip install "
            "--no-build-isolation dblocks",
            RuntimeWarning,
            stacklevel=2,
        )
        return f"built, but does not load: {error}"
    return ""


MISSING = _load()
"""Why the C++ ops cannot run here; empty where they can."""
