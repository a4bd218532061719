"""The four Serve deployments, one module each, and the startup steps of every replica."""
