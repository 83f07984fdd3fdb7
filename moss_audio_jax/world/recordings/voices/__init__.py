"""One module for each package of voices."""
