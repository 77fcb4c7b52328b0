"""A real model for evaluation, from a GGUF file."""
