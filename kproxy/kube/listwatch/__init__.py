"""List and watch the API server: one reflector per kind of object."""
