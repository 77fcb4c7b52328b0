"""What a cache is judged on: one file a task. All are generated from a seed, or read from files."""
