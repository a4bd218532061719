"""Traces and metrics. The only package that imports OpenTelemetry.

A stage fills a record (``records``) of plain times and counts while it works. Off the request path, one thread per
process turns records into spans (``spans``) and measurements (``measures``) and hands them to the SDK (``provider``).
"""
