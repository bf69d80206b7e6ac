"""What a kernel with given rules would do to a packet, worked out from the text of a dump alone. Pure.

Nothing here knows who wrote the rules or why: the same evaluation serves kproxy's own rules, those of another
proxy, and a recording. What it does not know is an error, never a guess.
"""
