"""PiKV inside other projects' pipelines."""
