"""What people read: lines, tables, sizes. Nothing hostile and no secret gets out here."""
