"""Turns spans into requests and shows where the time of each one went."""
