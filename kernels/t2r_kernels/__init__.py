"""Kernels of the recurrent mixers. Needs torch (and triton on a GPU) and nothing else of t2r."""
