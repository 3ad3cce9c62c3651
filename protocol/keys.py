"""The key that signs a ledger: an Ed25519 private key in a file beside it.

The key that follows it is in a file of its own until the ledger has named it (``prepare``); then it
takes the key's place (``promote``). Whenever a rotation is killed, one of the two files has the key
that signs.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from fwdllm.engine.errors import ConfigError
from fwdllm.engine.files import write_private

# The file has the ledger's name and this.
SUFFIX = ".key"
NEXT_SUFFIX = ".key.next"


def file_of(ledger: Path) -> Path:
    """Where a ledger's private key is."""
    return ledger.with_name(ledger.name + SUFFIX)


def next_file_of(ledger: Path) -> Path:
    """Where the private key is that follows, while it does not sign yet."""
    return ledger.with_name(ledger.name + NEXT_SUFFIX)


def make(ledger: Path) -> Ed25519PrivateKey:
    """The key for a new ledger: that in the file, or a new one. Errors: ConfigError, OSError."""
    if not file_of(ledger).exists():
        write_private(file_of(ledger), new_key())
    return read(ledger)


def read(ledger: Path, public: bytes | None = None) -> Ed25519PrivateKey:
    """The key beside a ledger. public: its public half, if that is known. Errors: ConfigError."""
    if public is not None and (following := _key_of(public, next_file_of(ledger))):
        return following  # a rotation was killed
    path = file_of(ledger)
    try:
        found = load_key(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: only with it can the run go on") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot use the key {path}: {error}") from error
    if public not in (None, public_key(found)):
        raise ConfigError(f"{path} is not the key that has signed {ledger.name}")
    return found


def prepare(ledger: Path) -> Ed25519PrivateKey:
    """The key that is to follow: that in its file, or a new one. It is on disk on return.

    Errors: ConfigError, OSError.
    """
    path = next_file_of(ledger)
    if not path.exists():
        write_private(path, new_key())
    try:
        return load_key(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"cannot use the key {path}: {error}") from error


def promote(ledger: Path, public: bytes) -> None:
    """Put the key that follows in the key's place if its public half is the one that signs now.

    The file before is gone. Errors: OSError.
    """
    path, following = file_of(ledger), next_file_of(ledger)
    if _key_of(public, following) and not _key_of(public, path):
        os.replace(following, path)


def _key_of(public: bytes, path: Path) -> Ed25519PrivateKey | None:
    """The key in a file if its public half is the given one."""
    with contextlib.suppress(OSError, ValueError):
        found = load_key(path.read_bytes())
        if public_key(found) == public:
            return found
    return None


def copy(ledger: Path, to: Path, public: bytes) -> None:
    """Give a copy of a ledger the key whose public half is given. Errors: ConfigError, OSError."""
    write_private(file_of(to), _pem(read(ledger, public)))


def new_key() -> bytes:
    """A new Ed25519 private key, PKCS #8 in PEM as OpenSSL writes it."""
    return _pem(Ed25519PrivateKey.generate())


def _pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def load_key(pem: bytes) -> Ed25519PrivateKey:
    """The inverse of ``new_key``; ValueError for anything else."""
    try:
        key = load_pem_private_key(pem, None)
    except (TypeError, ValueError, UnsupportedAlgorithm) as error:  # TypeError: a password
        raise ValueError("it is no private key in PEM without a password") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError("it is no Ed25519 key")
    return key


def public_key(key: Ed25519PrivateKey) -> bytes:
    """The public half: 32 bytes."""
    return key.public_key().public_bytes_raw()
