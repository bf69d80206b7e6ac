"""Events that kproxy writes to the API server."""
