"""Rows: read, judged, made into tokens, set aside for evaluation."""
