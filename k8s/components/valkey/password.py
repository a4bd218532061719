"""Makes the Secret of Valkey's password, unless there is one: runs before Valkey, in its pod.

Its account may create Secrets in this namespace, and nothing else: it cannot read what is there.
"""

import base64
import json
import os
import secrets
import ssl
import sys
import urllib.error
import urllib.request
from pathlib import Path

ACCOUNT = Path(os.environ.get("SERVICE_ACCOUNT", "/var/run/secrets/kubernetes.io/serviceaccount"))
SERVER = os.environ.get("KUBERNETES_API", "https://kubernetes.default.svc")
NAME = "slowlens-valkey"

namespace = (ACCOUNT / "namespace").read_text()
password = base64.b64encode(secrets.token_hex(32).encode()).decode()
secret = {
    "apiVersion": "v1",
    "kind": "Secret",
    "metadata": {"name": NAME, "labels": {"app.kubernetes.io/name": NAME}},
    "immutable": True,
    "data": {"password": password},
}
request = urllib.request.Request(
    f"{SERVER}/api/v1/namespaces/{namespace}/secrets",
    data=json.dumps(secret).encode(),
    headers={"Authorization": f"Bearer {(ACCOUNT / 'token').read_text()}", "Content-Type": "application/json"},
)
context = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt")) if SERVER.startswith("https") else None
try:
    with urllib.request.urlopen(request, timeout=10, context=context):
        print(f"made the Secret {NAME}")  # noqa: T201
except urllib.error.HTTPError as error:
    if error.code != 409:
        sys.exit(f"cannot make the Secret {NAME}: {error.code} {error.read().decode(errors='replace')}")
    print(f"there is a Secret {NAME}")  # noqa: T201
