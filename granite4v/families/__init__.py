"""The model families, one module each, their shared code, and `registry`, which finds the family of a model."""
