"""``python -m clipkit``."""

from clipkit.cli import main

if __name__ == "__main__":
    main()
