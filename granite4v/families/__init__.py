"""The model families, one file each, their shared code, and `registry`, which finds a model's family."""
