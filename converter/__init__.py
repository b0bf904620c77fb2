"""Hugging Face checkpoint to GGUF: plan, merge, quantize, write."""
