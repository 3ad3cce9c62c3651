"""Gradients from forward passes: which lanes to run, and what their losses say."""
