"""Annotation: raw audio cut at its events, described by measurement, made into training rows."""
