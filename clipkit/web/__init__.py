"""The server behind ``clipkit serve``: an HTTP API, a page, and what keeps both within bounds."""
