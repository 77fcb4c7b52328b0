"""Kernels of a CPU, in C++: built for its processor when they are first called."""
