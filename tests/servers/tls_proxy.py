"""Terminates TLS in front of a server that has none of its own."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading


class TlsProxy:
    """Takes TLS connections on a loopback port and passes their bytes on to another port."""

    def __init__(self, context: ssl.SSLContext, port: int) -> None:
        """`context` has the certificate, what the clients must show, and the ALPN protocols (`h2` for gRPC)."""
        self._context = context
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]

    def __enter__(self) -> TlsProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        # Closing alone does not wake up a thread in accept().
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        # A failed handshake is the client's to report.
        with contextlib.suppress(OSError), client:
            client.settimeout(10)
            with (
                self._context.wrap_socket(client, server_side=True) as plain,
                socket.create_connection(("127.0.0.1", self._target)) as server,
            ):
                plain.settimeout(None)
                back = threading.Thread(target=_copy, args=(server, plain), daemon=True)
                back.start()
                _copy(plain, server)
                back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
