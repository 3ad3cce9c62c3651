"""Gradients from forward passes: which lanes to run, and derivatives from their losses."""
