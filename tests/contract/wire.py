"""Servers that misbehave: one that loses answers, one that only claims to be Redis."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class LossyProxy:
    """Forwards one client at a time to a server; `lose` the next answers to commands that hold a word.

    The command is forwarded and the server's answer awaited, then both sockets are closed: the
    server has done the work and the client does not know it.
    """

    def __init__(self, server_port: int) -> None:
        self.lose = 0
        self.word = b"FCALL"
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with suppress(OSError):  # `close` ends the accept
            while True:
                client, _ = self._listener.accept()
                with client, socket.create_connection(("127.0.0.1", self._server_port)) as server:
                    client.settimeout(5.0)
                    server.settimeout(5.0)
                    self._forward(client, server)

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        while command := client.recv(1 << 20):
            server.sendall(command)
            answer = server.recv(1 << 20)
            if self.lose and self.word in command:
                self.lose -= 1
                return
            client.sendall(answer)

    def close(self) -> None:
        """Stops listening; a connection that is open ends with its client."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10.0)


@contextmanager
def answering(answers: dict[str, str]) -> Iterator[int]:
    """A port of something that gives a command its answer by its first word, and OK to all others."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        client, _ = listener.accept()
        with client, suppress(OSError):
            while command := client.recv(1 << 16):
                for part in command.split(b"*")[1:]:  # each command is an array: *2 $4 INFO $6 server
                    client.sendall(answers.get(part.split(b"\r\n")[2].decode(), "+OK\r\n").encode())

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with listener:
        yield listener.getsockname()[1]
        thread.join(10.0)


def redis_of(info: str) -> dict[str, str]:
    """The answers of a server whose INFO is a text."""
    return {"HELLO": "%1\r\n+proto\r\n:3\r\n", "INFO": f"${len(info)}\r\n{info}\r\n"}
