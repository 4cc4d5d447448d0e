"""dblocks: fused noise-conditioned layers, and residual networks trained one block at a time."""

from dblocks._version import __version__ as __version__
