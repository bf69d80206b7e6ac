"""What the commands that explain a node report: the state of a daemon, of a Service, of a packet, of the host."""
