"""Triton kernels and the functions that launch them. Importing a module of this package needs triton."""
