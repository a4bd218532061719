"""Servers that keep traces."""
