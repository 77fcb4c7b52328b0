"""What was measured, kept in a file and shown: tables and pictures."""
