"""One file per command. Tasks do not import one another."""
