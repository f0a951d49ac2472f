"""A WebSocket server that does nothing by itself: a test says byte for byte what it sends, and sees what came.

with RawWebSocket() as server:
    client = dial(server.url)
    server.send(frame_bytes(TEXT, b"hello"))
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from typing import Self

from kit.websocket_wire import accept_key, masked

WAIT_S = 60.0


class RawWebSocket:
    """One client at a time; `refusal`: a whole HTTP answer that every handshake gets instead of the WebSocket.

    `heads`: the head of each handshake. `frames`: what clients sent, as (opcode, payload), with (-1, b"") for the end.
    """

    def __init__(self, refusal: bytes = b"") -> None:
        self.refusal = refusal
        self.heads: list[str] = []
        self.frames: queue.Queue[tuple[int, bytes]] = queue.Queue()
        self._clients: queue.Queue[socket.socket] = queue.Queue()
        self._client: socket.socket | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.url = f"ws://127.0.0.1:{self.port}/ws"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for one in (self._listener, self._client, *self._clients.queue):
            if one is not None:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                one.close()

    def client(self) -> socket.socket:
        """Return the connection to the client that came last, waiting for one at first."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._client = self._clients.get(timeout=0.0 if self._client else WAIT_S)
        assert self._client is not None, "no client came"
        return self._client

    def send(self, *pieces: bytes) -> None:
        """Send pieces one after the other."""
        for piece in pieces:
            self.client().sendall(piece)

    def hang_up(self) -> None:
        """End the connection."""
        self.client().shutdown(socket.SHUT_RDWR)

    def next_frame(self) -> tuple[int, bytes]:
        """Return the next frame of a client, waiting for it."""
        return self.frames.get(timeout=WAIT_S)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError), client, client.makefile("rb") as stream:
            head = ""
            while not head.endswith("\r\n\r\n"):
                line = stream.readline()
                if not line:
                    return
                head += line.decode()
            self.heads.append(head)
            if self.refusal:
                client.sendall(self.refusal)
                return
            key = next(
                line[18:].strip() for line in head.splitlines() if line.startswith("Sec-WebSocket-Key")
            )
            client.sendall(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Accept: " + accept_key(key).encode() + b"\r\n\r\n"
            )
            self._clients.put(client)
            while first := stream.read(2):
                size = first[1] & 0x7F
                if size > 125:
                    size = int.from_bytes(stream.read(2 if size == 126 else 8))
                mask = stream.read(4)
                self.frames.put((first[0] & 0xF, masked(stream.read(size), mask)))
        self.frames.put((-1, b""))
