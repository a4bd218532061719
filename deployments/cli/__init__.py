"""The ``slowlens`` command."""
