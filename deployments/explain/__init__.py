"""The ``slowlens`` command: reads traces and shows what a request did. Imports neither Ray nor torch."""
