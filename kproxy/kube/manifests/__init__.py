"""Objects from YAML and JSON files."""
