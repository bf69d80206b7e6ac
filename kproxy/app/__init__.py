"""The daemon, the one-shot commands, and the steps that they share."""
