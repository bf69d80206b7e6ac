"""Simulate what a kernel with given rules would do to a packet, from the text of a dump alone. Pure.

The simulators do not know who wrote the rules: they evaluate kproxy's own rules, those of another proxy, and
recordings. A rule that they do not support is an error, never a guess.
"""
