"""Requests as they are written, also ones that no well-behaved client sends."""

from __future__ import annotations

import http.client
import json
import urllib.parse
from typing import NamedTuple

JSON = {"Content-Type": "application/json"}
BYTES = {"Content-Type": "application/octet-stream"}


class Answer(NamedTuple):
    """What came back."""

    status: int
    body: bytes
    headers: dict[str, str]

    def json(self) -> dict:
        """Return the body, which is JSON.

        Raises:
            ValueError: it is not, as where it has NaN.
        """
        return json.loads(self.body, parse_constant=lambda name: json.loads(""))


class _Unchecked(http.client.HTTPConnection):
    def _validate_path(self, url: str) -> None:
        pass

    def _encode_request(self, request: str) -> bytes:
        return request.encode("latin-1")


class Connection:
    """One connection to a server, opened again when the server has closed it."""

    def __init__(self, url: str) -> None:
        """Take the server's address."""
        self._host = urllib.parse.urlsplit(url).netloc
        self._connection = _Unchecked(self._host, timeout=60)

    def ask(
        self, method: str, target: str, body: bytes = b"", headers: dict | None = None
    ) -> Answer:
        """Send a request and return the answer.

        A header that is None is left out; one that is a tuple is there more than once.

        Raises:
            OSError, http.client.HTTPException: there is none.
        """
        try:
            return self._ask(method, target, body, headers or {})
        except (http.client.HTTPException, OSError):
            # It may have been closed since: who refuses a body need not read it.
            self.close()
            return self._ask(method, target, body, headers or {})

    def _ask(self, method: str, target: str, body: bytes, headers: dict) -> Answer:
        self._connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
        for key, value in {"Host": self._host, "Content-Length": len(body), **headers}.items():
            values = value if isinstance(value, tuple) else (value,)
            for one in values if value is not None else ():
                self._connection.putheader(key, one)
        self._connection.endheaders(body or None)
        response = self._connection.getresponse()
        found = {key.lower(): value for key, value in response.getheaders()}
        return Answer(response.status, response.read(), found)

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        self._connection.close()
