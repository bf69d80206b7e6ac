"""Cleanup of what kube-proxy's ipvs mode leaves on a node."""
