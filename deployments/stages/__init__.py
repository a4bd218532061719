"""The four Serve deployments, one module each, and what every replica does at its start."""
