"""Copies of a run's ledger, also while the run goes on."""

from __future__ import annotations

from pathlib import Path

from fwdllm.engine.errors import ConfigError
from fwdllm.engine.files import atomic_write, is_unused
from fwdllm.engine.sqlite import ERRORS, copy_to
from fwdllm.protocol import keys
from fwdllm.protocol.ledger import NAME, Ledger, LedgerError
from fwdllm.protocol.replay import Verified, verify
from fwdllm.protocol.shards.check import has_orders_of_shards


def back_up(run_dir: Path, destination: Path, *, with_key: bool = False) -> Verified:
    """Copy the ledger of a run to a new folder, as it is at one moment; what was found in the copy.

    The copy has its name only when it is whole and verified: a kill leaves a folder without a
    ledger, which another attempt takes.  with_key: copy the private key, too, which lets the run go
    on there.

    Errors: ConfigError, LedgerError, OSError.
    """
    source, copy = run_dir / NAME, destination / NAME
    if not source.is_file():
        raise LedgerError(f"there is no ledger at {source}")
    # A key alone is what a kill left, or somebody's: it stays only where one was asked for.
    left = (f".{NAME}", keys.file_of(copy).name) if with_key else (f".{NAME}",)
    if destination.exists() and not (destination.is_dir() and is_unused(destination, *left)):
        raise ConfigError(f"{destination} is not an empty folder; name a new one")
    destination.mkdir(parents=True, exist_ok=True)
    with atomic_write(copy) as temporary:
        temporary.chmod(0o600)  # it has a secret and clients' contributions
        found = _copied(source, temporary)
        if with_key and found.key is not None:
            keys.copy(source, copy, found.key)
    return found


def missing_to_resume(found: Verified, *, with_key: bool) -> list[str]:
    """What a backup does not have that the run needs to go on from it."""
    key = [f"{NAME}{keys.SUFFIX}, the private key that signs (--with-key)"]
    return [
        *(key if found.key is not None and not with_key else []),
        "the model and the data, whose fingerprints the ledger has",
        "the options of simulate, or the Flower app, whose run-dir is to be this folder",
    ]


def _copied(source: Path, to: Path) -> Verified:
    try:
        copy_to(source, to)
        with Ledger(to) as record:
            if has_orders_of_shards(record):
                raise ConfigError(
                    f"the reports of {source} are in the ledgers of {record.meta.shards} shards, "
                    "and a backup is of one ledger: stop the run and copy its folder"
                )
            return verify(record)
    except LedgerError as error:  # a copy has the faults of what it is of
        raise LedgerError(str(error).replace(str(to), str(source))) from error
    except ERRORS as error:
        raise LedgerError(f"cannot copy {source}: {error}") from error
