"""Learned ways to steer; one method a file."""
