"""Whole graphs: one backbone a file, imported by its module."""
