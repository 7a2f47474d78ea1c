"""FAISS indexes on disk: build, search, update, calibrate."""
