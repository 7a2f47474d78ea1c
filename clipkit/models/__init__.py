"""Dual encoders for inference: loading, tokenizing, encoding."""
