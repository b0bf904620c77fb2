"""Document-reading vision-language models on ordinary machines."""
