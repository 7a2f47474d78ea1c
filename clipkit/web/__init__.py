"""The server of ``clipkit serve``: an HTTP API, a search page, and their resource limits."""
