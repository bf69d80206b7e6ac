"""Cleanup of the objects that kube-proxy's ipvs mode leaves on a node."""
