"""Sync the kernel with the desired state: when to sync, what to program, and how to report the outcome."""
