"""Self-contained HTML reports of runs, evaluations and classifications."""
