"""The keys that clients present, and whether one opens a route."""

import hashlib
import secrets
from collections.abc import Iterable
from typing import Final

from cascadeinfer.frontend.door.routes import Access

SCHEME: Final = b"bearer"


class Keys:
    """
    API keys and admin keys. A route is open when the operator gave no key of its kind; an admin key opens every route.

    Without admin keys the API keys also open the admin routes.
    """

    def __init__(self, api_keys: Iterable[str], admin_keys: Iterable[str]) -> None:
        """
        Args:
            api_keys: For inference; if empty, inference is open to anybody.
            admin_keys: For everything else; if empty, the API keys are used.
        """
        api, admin = _digests(api_keys), _digests(admin_keys)
        self.separate = bool(admin)
        self._opens = {
            Access.OPEN: None,
            Access.INFERENCE: (api | admin) if api else None,
            Access.ADMIN: admin or api or None,
        }
        self._known = api | admin

    def open(self, access: Access, authorization: bytes) -> bool:
        """Whether the value of an `Authorization` header opens a route of this kind."""
        keys = self._opens[access]
        return keys is None or _is_among(authorization, keys)

    def knows(self, authorization: bytes) -> bool:
        """Whether it is a valid key, if perhaps not for this route."""
        return _is_among(authorization, self._known)


def _digests(keys: Iterable[str]) -> frozenset[bytes]:
    return frozenset(hashlib.sha256(key.encode()).digest() for key in keys)


def _is_among(authorization: bytes, digests: frozenset[bytes]) -> bool:
    """Whether the key is among these, compared in constant time and with every key."""
    scheme, _, shown = authorization.partition(b" ")
    digest = hashlib.sha256(shown).digest()
    same = [secrets.compare_digest(digest, known) for known in digests]
    return scheme.lower() == SCHEME and any(same)
