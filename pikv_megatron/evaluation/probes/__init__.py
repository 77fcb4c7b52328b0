"""What is watched while a cache is judged; nothing here changes what it does."""
