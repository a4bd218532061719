"""The HTTP layer: the ASGI application, request bodies, responses and headers."""
