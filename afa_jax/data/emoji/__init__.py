"""Emoji scenes: the small data set that the project carries, see docs and LICENSES.md."""
