"""The key that signs a ledger: an Ed25519 private key in a file beside it."""

from __future__ import annotations

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


def file_of(ledger: Path) -> Path:
    """Where a ledger's private key is."""
    return ledger.with_name(ledger.name + SUFFIX)


def make(ledger: Path) -> Ed25519PrivateKey:
    """The key for a new ledger: that in the file, or a new one. Errors: ConfigError, OSError."""
    if not file_of(ledger).exists():
        write_private(file_of(ledger), new_key())
    return read(ledger)


def read(ledger: Path, public: bytes | None = None) -> Ed25519PrivateKey:
    """The key beside a ledger. public: its public half, if that is known. Errors: ConfigError."""
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


def new_key() -> bytes:
    """A new Ed25519 private key, PKCS #8 in PEM as OpenSSL writes it."""
    key = Ed25519PrivateKey.generate()
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
