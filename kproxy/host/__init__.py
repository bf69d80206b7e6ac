"""What touches the node: processes, netlink, sysctls. Knows the model, never a backend."""
