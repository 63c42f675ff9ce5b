"""Data sets: a reader for each format, and the packed store."""
