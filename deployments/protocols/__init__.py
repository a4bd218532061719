"""The APIs that the ingress speaks: what their requests may say, and what their responses and errors look like."""
