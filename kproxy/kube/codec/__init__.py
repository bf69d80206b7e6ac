"""From the API server's bytes to model objects, in JSON and protobuf."""
