"""Retrieval, classification and calibration measures with intervals: pure functions on arrays."""
