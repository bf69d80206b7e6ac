"""End-to-end tests: what a cluster's users see, on any cluster named by KUBECONFIG, or on one of network namespaces."""
