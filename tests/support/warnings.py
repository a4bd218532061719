"""Warnings of tests that run Ray in their own process."""

from __future__ import annotations

import gc
import warnings

import pytest


def ignore_what_ray_leaves_open(config: pytest.Config) -> None:
    """Ray closes some of its sockets only when they are collected, at any moment up to the end of the session.

    For sessions with such tests only: in ``tests/unit`` alone, as ``scripts/check`` runs it, both are errors.
    """
    config.addinivalue_line("filterwarnings", "ignore::ResourceWarning")
    config.addinivalue_line("filterwarnings", "ignore::pytest.PytestUnraisableExceptionWarning")


def collect_what_ray_leaves_open() -> None:
    """At the end of the session, where pytest applies the filters of pyproject.toml alone to what it collects."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for _ in range(3):
            gc.collect()
