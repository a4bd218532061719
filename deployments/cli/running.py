"""The process that ``slowlens serve`` supervises: ``serve run``, which ends if an application cannot be started.

By itself ``serve run`` stays up with an application that has failed.
"""

from __future__ import annotations

import _thread
import sys
import threading
import time
from collections.abc import Sequence

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus
from ray.serve.scripts import cli

_LOOK_S = 1.0
_FAILED = ("UNHEALTHY", "DEPLOY_FAILED")


class _Watch:
    """Looks at the applications until all of them have run, or one has failed.

    Attributes:
        failure: which has failed, and why; empty if none has.
    """

    def __init__(self) -> None:
        self.failure = ""

    def run(self) -> None:
        while not self._is_over():
            time.sleep(_LOOK_S)

    def _is_over(self) -> bool:
        if not ray.is_initialized():
            return False
        try:
            applications = serve.status().applications
        except Exception:
            # Serve has not started yet, or is being shut down.
            return False
        for name, application in applications.items():
            if application.status == ApplicationStatus.DEPLOY_FAILED:
                reasons = [one.message for one in application.deployments.values() if one.status in _FAILED]
                self.failure = f"the application {name!r} cannot be started: " + "; ".join(
                    filter(None, [application.message, *reasons])
                )
                # As if the user had ended it.
                _thread.interrupt_main()
                return True
        return bool(applications) and all(
            application.status == ApplicationStatus.RUNNING for application in applications.values()
        )


def main(arguments: Sequence[str]) -> int:
    """Run ``serve`` with these arguments, and return the exit status."""
    watch = _Watch()
    threading.Thread(target=watch.run, name="slowlens-watch", daemon=True).start()
    try:
        cli.main(list(arguments), prog_name="serve")
    except SystemExit as end:
        if watch.failure:
            print(f"slowlens: {watch.failure}", file=sys.stderr)  # noqa: T201
            return 1
        return end.code if isinstance(end.code, int) else 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
