"""What a cache costs in quality: recall, perplexity and divergence beside the lossless cache."""
