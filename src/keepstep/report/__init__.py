"""A run as one HTML page: what it shows (pure), its charts, its template. No disk, no torch."""
