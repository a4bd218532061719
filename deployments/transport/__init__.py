"""Calls from the ingress to the other stages."""
