"""What kube-proxy's ipvs mode leaves on a node: finding it and removing it."""
