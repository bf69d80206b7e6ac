"""Bring the kernel to the desired state: when to sync, what to program, and what the outcome was."""
