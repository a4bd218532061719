"""slowlens: transformer inference on Ray Serve that can tell you why a request was slow."""

__version__ = "0.1.0"
