"""Engram memories of a model: compressed vocabularies, parameters, tables in files, their optimizer."""
