"""HTTP access to the API server: credentials, connections, responses."""
