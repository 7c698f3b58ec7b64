"""Kernels of the recurrent mixers. Needs torch (and triton on a GPU) and nothing else of t2r."""

from .gla import gla, gla_step
from .gsa import gsa, gsa_gates, gsa_step

__all__ = ["gla", "gla_step", "gsa", "gsa_gates", "gsa_step"]
