"""Third-party programs on the same checkpoint or the same files, and the comparisons with them.

`reference` is transformers on the checkpoint: it defines what is correct. `llama` is stock llama.cpp on the same GGUF
files. `mtmd` answers about images with it, also as a command that benchmarks run. `llama_cpp_convert` is llama.cpp's
converter. The product imports none of them.
"""
