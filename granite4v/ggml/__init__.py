"""ctypes bindings to the ggml that llama-cpp-python ships: declarations, backends and buffers, GGUF headers, graphs.

Importing this package loads no library; the first call does (see `library.lib`).
"""
