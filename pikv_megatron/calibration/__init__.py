"""What a model's keys, values and queries are like: what methods are fitted to."""
