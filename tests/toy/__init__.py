"""Tiny Hugging Face checkpoints with random weights and every feature enabled, for tests and benchmarks.

    python -m tests.toy.checkpoint OUT --preset tiny
    python -m tests.toy.checkpoint OUT --preset full-4.1    # real shapes: 4.0 billion parameters, 8 GB, about a minute

`spec` defines checkpoints and has the presets, `checkpoint` writes them, `language` makes their tokenizer and chat
template, and a module per family (`llava_next`, `llava_onevision`, `mllama`, `llama4`) has what only that family needs.
The tests in this folder compare the result with what transformers itself would have saved.
"""
