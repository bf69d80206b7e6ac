"""List and watch: one reflector per kind of object."""
