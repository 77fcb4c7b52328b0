"""Retention and codecs beside the presses of NVIDIA kvpress, on the same weights and tasks."""
