"""`far serve`: bundles behind an HTTP API. Needs the extra `serve`."""
