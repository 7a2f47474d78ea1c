"""Pages of results that need nothing beside them, as HTML."""
