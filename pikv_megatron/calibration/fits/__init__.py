"""What is summed up of every layer while text streams through a model, one thing a file."""
