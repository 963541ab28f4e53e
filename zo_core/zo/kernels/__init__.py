"""Fused CUDA kernels of the ZO step. Import only where a GPU is: they need Triton."""
