"""Retroactive sampling: what was recorded is held until it is known whether its request mattered."""
