"""YAML and JSON documents with positions, and files that are read again when they change."""
