# SPDX-License-Identifier: Apache-2.0
"""Image names that only the holder of a key can recognise."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path, PureWindowsPath

from mgipt_monai.utils.files import atomic_path

__all__ = ["Pseudonyms", "without_names"]

KEY_BYTES, DIGITS = 32, 16
SHORTEST = 3  # shorter names would match many unrelated words


class Pseudonyms:
    """The same 16 hexadecimal digits for the same name, from HMAC-SHA256 with a random key.

    A plain hash of a guessable name can be guessed as well; this one cannot be without the key.

    Args:
        key_path: file of the key; created at first use, readable only by its owner.

    Example:
        >>> import tempfile
        >>> key_path = os.path.join(tempfile.mkdtemp(), "records.key")
        >>> pseudonym = Pseudonyms(key_path).of("clinic/eye_007")
        >>> len(pseudonym), Pseudonyms(key_path).of("clinic/eye_007") == pseudonym
        (16, True)
    """

    def __init__(self, key_path: str | os.PathLike[str]) -> None:
        self.key_path = Path(key_path)

    def of(self, name: str) -> str:
        """Return the pseudonym of a name.

        Raises:
            ValueError: if the key file does not contain a key.
        """
        return hmac.new(self._key, name.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:DIGITS]

    @cached_property
    def _key(self) -> bytes:
        if not self.key_path.exists():
            with atomic_path(self.key_path) as part:
                part.touch(mode=0o600)
                part.write_text(secrets.token_hex(KEY_BYTES))
        text = self.key_path.read_bytes()
        if not re.fullmatch(rb"[0-9a-f]{%d}" % (2 * KEY_BYTES), text):
            raise ValueError(f"{self.key_path} holds no key: restore the right file, or remove it to create a new key")
        return bytes.fromhex(text.decode())


def without_names(text: str, names: Iterable[str], instead: str) -> str:
    """Replace names, their file names with and without extension, and anything that looks like a path in a text.

    Example:
        >>> without_names("in/Ann Lee.png has 2 channels, its mask /out/x.png none", ["in/Ann Lee.png"], "9f")
        '9f has 2 channels, its mask 9f none'
    """
    hidden = set()
    for name in names:
        path = PureWindowsPath(name)  # handles both kinds of separators
        folder = str(name)[: -len(path.name)].rstrip("/\\") if path.name else ""
        hidden |= {str(name), path.name, path.name.split(".")[0], folder if len(path.parts) > 2 else ""}
    for name in sorted((name for name in hidden if len(name) >= SHORTEST), key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", instead, text)
    return re.sub(r"[^\s'\"]*[/\\][^\s'\",:;]*", instead, text)
