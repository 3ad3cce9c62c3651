"""Reports of one round taken by several processes, whose sums are added by one.

A shard takes the reports of its clients into a ledger of its own and closes a part with the sum of
them, integers as ``secure.sums`` has them. The root has the run's ledger, in which a shard's sum is
one row. Sums of integers are the same however clients are divided.
"""
