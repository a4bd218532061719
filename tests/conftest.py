from __future__ import annotations

import os
import signal

# Read when Ray and OpenTelemetry are imported, here and in every process that the tests start.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A cluster of its own for every test, whatever else runs on the machine or was left by what was killed there.
os.environ["RAY_ADDRESS"] = "local"
# Where the tests run in the background of a script it is ignored, and would be by the servers that are stopped with it.
signal.signal(signal.SIGINT, signal.default_int_handler)
