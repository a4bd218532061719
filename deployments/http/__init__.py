"""HTTP around a request: the ASGI application, bodies in, responses and headers out."""
