"""A run on the disk: read, written, owned, cleared. No torch."""
