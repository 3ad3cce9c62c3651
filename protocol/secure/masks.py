"""The cryptography of secure aggregation: keys, masks, and secrets in shares.

X25519, HKDF, ChaCha20 and ChaCha20-Poly1305 of ``cryptography``; Shamir's shares of PyCryptodome,
which shares secrets of 16 bytes, so secrets have 16 bytes here and keys are derived from them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fwdllm.engine.errors import ConfigError
from fwdllm.protocol.secure.letters import SecureError

# Bytes of a secret, and of a share of it.
SECRET = 16
# Bytes of a public key, and of a seed's commitment.
PUBLIC = COMMITMENT = 32


def public_key(secret: bytes) -> bytes:
    """The public half of the key that a secret stands for."""
    return _private(secret).public_key().public_bytes_raw()


def agreed(secret: bytes, public: bytes, purpose: str) -> bytes:
    """The 32 bytes that the holders of two keys have in common, for one purpose.

    SecureError for a public key with which everybody would have the same.
    """
    try:
        common = _private(secret).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise SecureError("a public key is none of X25519's") from error
    return _derived(common, purpose)


def commitment(seed: bytes) -> bytes:
    """What tells later whether a mask's seed is the one that a client drew."""
    return hashlib.sha256(b"fwdllm mask" + seed).digest()


def own_mask(seed: bytes, size: int) -> np.ndarray:
    """A client's own mask: uint64 [size]."""
    return _stream(_derived(seed, "own mask"), size)


def pair_key(secret: bytes, public: bytes, history: bytes) -> bytes:
    """The key of ``pair_mask`` for two clients that were told the same (``secure.history``)."""
    return agreed(secret, public, f"pair mask {history.hex()}")


def pair_mask(key: bytes, client: int, other: int, size: int) -> np.ndarray:
    """What client adds, and the other one adds negated: uint64 [size]. key: their agreed one."""
    mask = _stream(key, size)
    return mask if client < other else -mask


def seal(key: bytes, sender: int, context: bytes, data: bytes) -> bytes:
    """Encrypted, and bound to its context: 16 bytes longer. A pair's key serves once each way."""
    return ChaCha20Poly1305(key).encrypt(_nonce(sender), data, context)


def unseal(key: bytes, sender: int, context: bytes, data: bytes) -> bytes:
    """The inverse of ``seal``. Errors: SecureError."""
    try:
        return ChaCha20Poly1305(key).decrypt(_nonce(sender), data, context)
    except InvalidTag:
        raise SecureError(
            f"what client {sender} has sealed was changed on its way, or is for another part or "
            "with other keys"
        ) from None


def split(secret: bytes, threshold: int, n: int) -> list[bytes]:
    """A secret in n shares, of which threshold give it again; the i-th belongs to place i."""
    return [bytes(share) for _, share in _shamir().split(threshold, n, secret)]


def combine(shares: Sequence[tuple[int, bytes]]) -> bytes:
    """The secret from shares with their places. Wrong or too few shares give another secret."""
    return bytes(_shamir().combine([(place + 1, share) for place, share in shares]))


def _private(secret: bytes) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(_derived(secret, "x25519"))


def _derived(secret: bytes, purpose: str) -> bytes:
    info = f"fwdllm {purpose}".encode()
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(secret)


def _stream(key: bytes, size: int) -> np.ndarray:
    # Each key is used for one stream, so its nonce may be zero.
    encryptor = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    return np.frombuffer(encryptor.update(bytes(8 * size)), "<u8").astype(np.uint64)


def _nonce(sender: int) -> bytes:
    return sender.to_bytes(12, "little")


def _shamir() -> Any:
    try:
        from Crypto.Protocol.SecretSharing import Shamir
    except ImportError:
        raise ConfigError(
            "secure aggregation needs PyCryptodome: pip install 'fwdllm[federation]'"
        ) from None
    return Shamir
