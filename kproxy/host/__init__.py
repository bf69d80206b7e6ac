"""Access to the node: processes, netlink, sysctls, inotify. Imports only the model, never a backend."""
