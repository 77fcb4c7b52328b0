"""The demo model: a small byte-level MoE trained to recall key-value pairs and to continue code."""
