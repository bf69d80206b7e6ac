"""Kubernetes Events that kproxy reports to the API server."""
