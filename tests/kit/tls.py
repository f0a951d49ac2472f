"""TLS for simulators that have none: a front that takes it off."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
from typing import Self


def tie(one: socket.socket, other: socket.socket) -> None:
    """Pass on what comes from either side until one of them ends. One thread: TLS is not for two."""
    peers = {one: other, other: one}
    with contextlib.suppress(OSError, ValueError):
        while True:
            read = [sock for sock in peers if isinstance(sock, ssl.SSLSocket) and sock.pending()]
            for sock in read or select.select([*peers], [], [])[0]:
                data = sock.recv(65536)
                if not data:
                    return
                peers[sock].sendall(data)


class TlsFront:
    """Takes TLS connections and passes what they hold on to a port of loopback.

    With `drips` its handshake never ends.
    """

    def __init__(self, context: ssl.SSLContext, port: int, drips: bool = False) -> None:
        self._context = context
        self._target = port
        self._drips = drips
        self._sockets: list[socket.socket] = []
        self._ended = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for one in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._sockets.append(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if self._drips:
                client.recv(65536)  # what it is greeted with: a server does not speak first
                client.sendall(
                    b"\x16\x03\x03\x40\x00"
                )  # a handshake record of 16 KiB, which comes byte by byte
                while not self._ended.wait(0.02):
                    client.sendall(b"\x02")
                return
            wrapped = self._context.wrap_socket(client, server_side=True)
            server = socket.create_connection(("127.0.0.1", self._target))
            self._sockets += [wrapped, server]
            tie(wrapped, server)
            wrapped.close()
            server.close()
