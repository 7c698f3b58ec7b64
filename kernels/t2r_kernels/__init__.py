"""Kernels of the recurrent mixers. Needs torch (and triton on a GPU) and nothing else of t2r."""

from .gsa import gsa, gsa_step

__all__ = ["gsa", "gsa_step"]
