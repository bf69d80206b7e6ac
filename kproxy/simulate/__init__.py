"""Simulate what the kernel would do with a packet, given only a dump of the kernel's rules. Pure.

It does not matter which program wrote the rules: the simulators can evaluate the rules of kproxy, the rules of another
proxy, and recorded dumps. If a dump contains a rule that the simulators do not support, they raise an error instead of
guessing.
"""
