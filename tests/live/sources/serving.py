"""Sends video over loopback: a TCP server in a thread, and UDP from a process of its own (`python -m`)."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

PACKET_BYTES = 188 * 7  # of MPEG-TS in one UDP packet


@contextmanager
def tcp_server(connections: Sequence[tuple[bytes, float]]) -> Iterator[str]:
    """The address of a server: each connection gets bytes, is held for some seconds, and closed. Then it refuses."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)

        def serve() -> None:
            for content, hold_s in connections:
                with suppress(OSError), server.accept()[0] as one:
                    one.sendall(content)
                    closing.wait(hold_s)
            server.close()

        closing, thread = threading.Event(), threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
        closing.set()


def free_port() -> int:
    """A free UDP port."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def send_udp(path: Path, port: int, seconds: float) -> None:
    """Send a file of MPEG-TS evenly over some seconds."""
    content = path.read_bytes()
    parts = [content[at : at + PACKET_BYTES] for at in range(0, len(content), PACKET_BYTES)]
    begun = time.monotonic()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for number, part in enumerate(parts):
            time.sleep(max(begun + seconds * number / len(parts) - time.monotonic(), 0))
            sender.sendto(part, ("127.0.0.1", port))


if __name__ == "__main__":
    send_udp(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
