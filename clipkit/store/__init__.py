"""Vectors at rest: embedding stores and indexes. Never imports torch."""
