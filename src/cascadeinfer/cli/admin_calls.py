"""What commands need that speak with a running server: its address, its admin key, and its refusals in one line."""

import http.client
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

from cascadeinfer.core.errors import ConfigError

KEY_VARIABLE: Final = "CASCADEINFER_ADMIN_API_KEY"
KEY_HELP: Final = f"The server's admin key. Better set in the environment ({KEY_VARIABLE})."


def parsed_url(url: str, option: str) -> SplitResult:
    """
    The parts of a server's address.

    Raises:
        ConfigError: It is none.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises where it is no number
    except ValueError as error:
        raise ConfigError(f"{url!r} is not an address: {error}", option=option) from error
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigError(f"{url!r} is not an address", option=option, fix="for example http://127.0.0.1:8000")
    return parts


class AdminCalls:
    """
    The routes below `/admin` of one server.

    Attributes:
        where: Its address, for the operator.
    """

    def __init__(self, server: SplitResult, key: str | None) -> None:
        """
        Args:
            server: Its address.
            key: Its admin key; None: as the environment says.
        """
        self.where = f"{server.scheme}://{server.netloc}{server.path.rstrip('/')}"
        self._server = server
        self._key = key or os.environ.get(KEY_VARIABLE)

    @contextmanager
    def answer(
        self, method: str, path: str, timeout_s: float, *, accept: str = "application/json", body: Any = None
    ) -> Iterator[http.client.HTTPResponse]:
        """
        Call a route; the answer can be read in this context.

        Args:
            method: Of HTTP.
            path: Below the address.
            timeout_s: In which each part of the answer must come.
            accept: The kind of answer that is wanted.
            body: Sent as JSON unless it is None.

        Raises:
            ConfigError: The server refuses the call or the key, says nothing, or cannot be reached.
        """
        secure = self._server.scheme == "https"
        assert self._server.hostname is not None
        make = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = make(self._server.hostname, self._server.port, timeout=timeout_s)
        headers = {"Accept": accept, "Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, self._server.path.rstrip("/") + path, content, headers)
            answer = connection.getresponse()
            if answer.status not in {HTTPStatus.OK, HTTPStatus.ACCEPTED}:
                raise self._refusal(answer, path)
            yield answer
        except TimeoutError as error:
            raise ConfigError(f"{self.where} has said nothing for {timeout_s:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise ConfigError(f"{self.where} cannot be reached: {getattr(error, 'strerror', None) or error}") from error
        finally:
            connection.close()

    def call(self, method: str, path: str, timeout_s: float, body: Any = None) -> dict[str, Any]:
        """A call that is answered with a JSON object. Raises ConfigError as `answer` does."""
        with self.answer(method, path, timeout_s, body=body) as answer:
            told: dict[str, Any] = json.loads(answer.read())
        return told

    def _refusal(self, answer: http.client.HTTPResponse, path: str) -> ConfigError:
        fix = f"--admin-api-key, or {KEY_VARIABLE} in the environment"
        match answer.status:
            case HTTPStatus.UNAUTHORIZED if self._key is None:
                return ConfigError(f"{self.where} asks for its admin key", fix=fix)
            case HTTPStatus.UNAUTHORIZED:
                return ConfigError(f"{self.where} does not know this key", fix=fix)
            case HTTPStatus.FORBIDDEN:
                return ConfigError(f"{self.where} knows this key, but not as its admin key", fix=fix)
            case HTTPStatus.NOT_FOUND:
                return ConfigError(f"{self.where} has no {path}: it is another server, or an older version")
            case HTTPStatus.SERVICE_UNAVAILABLE:
                return ConfigError(f"{self.where} has too many viewers; try again later")
            case _:
                return ConfigError(
                    _message_in(answer.read()) or f"{self.where} answers {answer.status} {answer.reason}"
                )


def _message_in(body: bytes) -> str | None:
    """The server's own sentence in its answer, if there is one."""
    try:
        told = json.loads(body)
    except ValueError:
        return None
    if not isinstance(told, dict):
        return None
    error = told.get("error")
    message = error.get("message") if isinstance(error, dict) else told.get("detail")
    return message if isinstance(message, str) else None
