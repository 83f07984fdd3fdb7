"""Annotation: cuts raw audio at its events, describes it by measurement, and makes training
rows."""
