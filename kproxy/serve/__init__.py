"""What kproxy tells over HTTP: health, metrics, and the health check ports of Services."""
