"""The algorithms: one file each, and a registry of their names."""
