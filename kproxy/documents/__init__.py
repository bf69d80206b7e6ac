"""YAML and JSON documents with line numbers, and files that are read again when they change."""
