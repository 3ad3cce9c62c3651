"""Federations: in one process, and as apps for Flower."""
