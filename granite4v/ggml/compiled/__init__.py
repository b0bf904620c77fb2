"""Kernels compiled for this CPU by LLVM, in place of nodes of llama.cpp's graphs."""
