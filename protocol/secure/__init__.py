"""Secure aggregation: the server learns sums of clients' scalars, and no client's own.

``sums``: scalars as integers, and their sum as a report.  ``noise``: each client's share of
differential privacy's noise.  ``member``, ``cohort``: the two sides of the protocol of Bonawitz et
al. (Practical Secure Aggregation, CCS 2017), without a network.  ``history``: what masks depend on.
"""
