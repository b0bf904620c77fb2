"""The model families, one file each, what they share, and `registry`, which finds the one a model belongs to."""
