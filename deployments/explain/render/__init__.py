"""A verdict or a trace as text, JSON or HTML."""
