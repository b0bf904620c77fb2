"""ctypes bindings to the ggml that llama-cpp-python ships: declarations, owners, GGUF headers, graph helpers.

Importing this package loads no library; the first call does (see `library.lib`).
"""
