"""Sources of Kubernetes objects: the API server, or manifest files."""
