"""What one process does: the daemon, one-shot commands, and the parts they are built from."""
