"""Replicas by queue wait: the policy that serve_config.yaml names, and what the stages report to it.

``report`` is what a replica says of itself, ``meters`` measure it, ``decide`` is the pure decision, ``policy`` is what
Serve calls, ``settings`` are its arguments and ``announce`` tells operators. ``QueueWaitPolicy`` is the public name.
"""

from deployments.autoscaling.policy import QueueWaitPolicy

__all__ = ["QueueWaitPolicy"]
