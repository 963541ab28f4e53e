"""Unit tests: on the CPU, and on the GPU where there is one."""
