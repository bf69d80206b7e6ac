"""Trace a packet through every table of a node, from dumps of its rules. Only what is known counts: no guesses."""
