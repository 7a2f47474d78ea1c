"""Readers of the supported dataset layouts."""
