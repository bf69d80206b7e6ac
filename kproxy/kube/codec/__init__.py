"""Decode and validate objects of the API server, in JSON and protobuf."""
