"""Autoscaling by queue wait: the policy that serve_config.yaml names, and what the stages report to it.

``report`` is what a replica reports, ``meters`` measure it, ``decide`` is the pure decision, ``policy`` is what Serve
calls, ``settings`` are its arguments and ``announce`` informs operators. ``QueueWaitPolicy`` is the public name.
"""

from deployments.autoscaling.policy import QueueWaitPolicy

__all__ = ["QueueWaitPolicy"]
