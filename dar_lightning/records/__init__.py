"""Records beside results: metric protocols, sampling settings, provenance."""
