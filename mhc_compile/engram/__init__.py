"""Engram memories of a model: settings, compressed vocabularies, parameters."""
