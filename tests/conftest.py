from __future__ import annotations

import os

# Read when Ray and OpenTelemetry are imported, here and in every process that the tests start.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
