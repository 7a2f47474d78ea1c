"""Scripts for development, run as modules from the project's root: `python -m scripts.….NAME`."""
