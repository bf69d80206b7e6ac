"""Simulate what the kernel would do to a packet, given only a dump of its rules. Pure.

The simulators do not depend on which program wrote the rules: they can evaluate kproxy's rules, those of another proxy,
and recorded dumps. A rule that they do not support is an error, never a guess.
"""
