"""Tuning on this machine: the loop, its settings, and the run on disk."""
