"""Shared by all other packages: file I/O, and settings with their ranges."""
