"""What a model's keys, values and queries are like: the moments that codecs are fitted to."""
