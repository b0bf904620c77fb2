"""Kernels that LLVM compiles for this CPU."""
