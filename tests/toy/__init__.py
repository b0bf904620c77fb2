"""Tiny Hugging Face checkpoints with random weights and every feature switched on, for tests and benchmarks.

    python -m tests.toy.checkpoint OUT --preset tiny
    python -m tests.toy.checkpoint OUT --preset full-4.1    # real shapes: 4.0 billion parameters, 8 GB, about a minute

`spec` says what a checkpoint is made of and has the presets, `checkpoint` writes it, `language` makes its tokenizer
and chat template, and `llava_next` what LLaVA-NeXT checkpoints have of their own. The tests beside them hold the
result to what transformers itself would have saved.
"""
