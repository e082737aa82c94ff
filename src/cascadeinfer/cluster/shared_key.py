"""
The key that front ends and engines of one cluster share.

A file holds any secret text of at least 32 characters (`openssl rand -hex 32 > cascade.key`). From it both ends derive
the same CURVE key pair, and each accepts only a peer that has it. What they send each other is thereby authenticated
and encrypted; who does not have the file reaches nothing behind the sockets.
"""

import hashlib
import hmac
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from cascadeinfer.core.errors import ConfigError

MIN_CHARACTERS: Final = 32
DERIVED_FOR: Final = b"cascadeinfer cluster 1"
"""Distinguishes the derived key from other uses of the same secret."""
OTHERS_MAY_READ: Final = stat.S_IRGRP | stat.S_IROTH


@dataclass(frozen=True, slots=True)
class ClusterKey:
    """
    The CURVE key pair of a cluster, as Z85 text.

    Attributes:
        public: The half that a peer must show.
        secret: The other half; never logged.
    """

    public: bytes
    secret: bytes = field(repr=False)

    @classmethod
    def of(cls, secret_text: str) -> "ClusterKey":
        """
        The pair that belongs to a secret.

        Raises:
            ValueError: It is shorter than 32 characters.
        """
        if len(secret_text) < MIN_CHARACTERS:
            raise ValueError(f"a key has at least {MIN_CHARACTERS} characters, this one has {len(secret_text)}")
        digest = hashlib.blake2b(secret_text.encode(), digest_size=32, person=hashlib.sha256(DERIVED_FOR).digest()[:16])
        secret = z85.encode(digest.digest())
        return cls(zmq.curve_public(secret), secret)

    @classmethod
    def read(cls, path: Path, option: str) -> "ClusterKey":
        """
        The pair for the secret in a file.

        Args:
            path: The file; white space around the secret does not count.
            option: Names the setting in errors.

        Raises:
            ConfigError: The file cannot be read, or holds no key.
        """
        fix = f"make one: openssl rand -hex 32 > {path}; chmod 600 {path}"
        try:
            return cls.of(path.read_text(encoding="utf-8").strip())
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}", option=option, fix=fix) from error
        except ValueError as error:
            why = "is no text" if isinstance(error, UnicodeDecodeError) else str(error)
            raise ConfigError(f"{path}: {why}", option=option, fix=fix) from error

    def listen(self, sock: "zmq.Socket[Any]") -> None:
        """Prepare a socket that will be bound: it accepts connections of this key only, see `only_ours`."""
        sock.setsockopt(zmq.CURVE_SERVER, 1)
        sock.setsockopt(zmq.CURVE_SECRETKEY, self.secret)

    def call(self, sock: "zmq.Socket[Any]") -> None:
        """Prepare a socket that will be connected: it talks only to a listener with this key."""
        sock.setsockopt(zmq.CURVE_SERVERKEY, self.public)
        sock.setsockopt(zmq.CURVE_PUBLICKEY, self.public)
        sock.setsockopt(zmq.CURVE_SECRETKEY, self.secret)

    @contextmanager
    def only_ours(self, context: "zmq.Context[Any]") -> Iterator[None]:
        """While this lasts, listeners of the context accept connections of this key and no others."""
        authenticator = ThreadAuthenticator(context)
        # Before it starts: it would turn away whoever comes first.
        authenticator.configure_curve_callback(credentials_provider=_Only(self.public))
        authenticator.start()
        try:
            yield
        finally:
            authenticator.stop()


class _Only:
    """ZAP's credentials provider for one public key."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, _domain: str, key: bytes) -> bool:
        """Whether the peer that shows this key may come in."""
        return hmac.compare_digest(key, self._public)


def others_may_read(path: Path) -> bool:
    """Whether other users of the machine may read the file."""
    return bool(path.stat().st_mode & OTHERS_MAY_READ)
