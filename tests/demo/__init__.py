"""`make demo`: a node, its pods and a client in network namespaces, real requests, and what kproxy does for them."""
