"""Other people's programs on the same checkpoint or the same files, and the comparisons with them.

`reference` is transformers, on the checkpoint: the definition of what is right. `llama` is stock llama.cpp on the same
GGUF files, and `mtmd` answers with it about images, as a command that benchmarks run as well. `llama_cpp_convert` is
llama.cpp's converter. The product imports none of them.
"""
