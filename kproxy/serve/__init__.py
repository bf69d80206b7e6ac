"""The HTTP endpoints: health, metrics, and the health check node ports of Services."""
