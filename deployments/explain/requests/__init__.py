"""Spans to requests: what each request spent its time on."""
