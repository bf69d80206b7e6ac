"""End-to-end tests, on the cluster of KUBECONFIG or on an emulated cluster of network namespaces."""
