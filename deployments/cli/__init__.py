"""The command ``slowlens``."""
