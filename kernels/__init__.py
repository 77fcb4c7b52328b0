"""Triton kernels; imported as `pikv_kernels`."""
