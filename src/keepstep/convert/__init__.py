"""A checkpoint in another form: exported, merged, or taken in from elsewhere."""
