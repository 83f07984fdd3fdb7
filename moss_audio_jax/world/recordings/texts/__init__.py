"""One module for each source of sentences."""
