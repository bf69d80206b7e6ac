"""Read YAML and JSON documents with line numbers, and watch files for changes."""
