"""Annotation: cuts raw audio at its events, measures it, and makes training rows."""
