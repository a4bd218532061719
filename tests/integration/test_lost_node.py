"""A node that is lost without a word, in a network namespace of its own: its callers notice within a second."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from deployments.messages import Reply
from deployments.transport import codec
from deployments.transport.connection import Connection, ReplicaLost
from tests.support.channels import SECRET, send

NAMESPACE, HERE, THERE = "slowlens-test", "slowlens-here", "slowlens-there"
ADDRESS, PORT = "10.99.0.2", 21000
CALLEE = f"""
import asyncio
from tests.support.channels import Stage

async def serve():
    await Stage().server.listen("{ADDRESS}", {PORT}, {PORT})
    print("listening", flush=True)
    await asyncio.Event().wait()

asyncio.run(serve())
"""


def ip(*arguments: str) -> bool:
    return subprocess.run(["ip", *arguments], capture_output=True, check=False).returncode == 0


def make_network() -> bool:
    """Connect a namespace to this one by a cable. False where that is not allowed."""
    return (
        shutil.which("ip") is not None
        and os.geteuid() == 0
        and ip("netns", "add", NAMESPACE)
        and ip("link", "add", HERE, "type", "veth", "peer", "name", THERE)
        and ip("link", "set", THERE, "netns", NAMESPACE)
        and ip("addr", "add", "10.99.0.1/24", "dev", HERE)
        and ip("link", "set", HERE, "up")
        and ip("-n", NAMESPACE, "addr", "add", f"{ADDRESS}/24", "dev", THERE)
        and ip("-n", NAMESPACE, "link", "set", THERE, "up")
    )


@pytest.fixture
def other_node() -> Iterator[None]:
    """A stage that listens in another network namespace."""
    try:
        if not make_network():
            pytest.skip("needs root, the program ip and the right to make network namespaces")
        command = ["ip", "netns", "exec", NAMESPACE, sys.executable, "-c", CALLEE]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "listening\n"
        yield
        process.kill()
        process.communicate()
    finally:
        ip("link", "del", HERE)
        ip("netns", "del", NAMESPACE)


@pytest.mark.usefixtures("other_node")
def test_calls_of_a_lost_node_fail_within_a_second() -> None:
    async def run() -> float:
        connection = Connection(SECRET, codec.Decoder(Reply[str]), lambda: None)
        await asyncio.get_running_loop().create_connection(lambda: connection, ADDRESS, PORT)
        await connection.ready
        sent = send(connection, "hang", timeout_s=60)
        # The call has arrived and is acknowledged: nothing but the pings is on its way.
        await asyncio.sleep(0.5)
        ip("-n", NAMESPACE, "link", "set", THERE, "down")
        lost_at = time.monotonic()
        with pytest.raises(ReplicaLost):
            await sent.reply
        return time.monotonic() - lost_at

    assert asyncio.run(asyncio.wait_for(run(), 20)) < 1.0
