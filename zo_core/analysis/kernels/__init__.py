"""Kernels of the analyses."""
