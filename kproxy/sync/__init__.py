"""Bringing the kernel to the desired state: when, what, and what was accepted."""
