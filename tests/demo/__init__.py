"""`make demo`: kproxy on a node, with pods and a client, in network namespaces and with real requests."""
