"""A checkpoint's life: staging → committed → trash. Pure decisions apart from the disk."""
