"""Deterministic simulation: random histories of a cluster, kproxy and a hostile host, replayed from a seed.

Nothing here uses real threads or real time. `python -m tests.simulation SEED --verbose` prints one history.
"""
