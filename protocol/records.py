"""What a ledger records about a run as a whole, and about each round."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fwdllm.engine.adapters.adapter import LAYOUT_VERSION, Adapter, Head, Target
from fwdllm.engine.settings import LoRAConfig
from fwdllm.kernels import cpu
from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.shards.messages import check_shards

# Raised whenever a ledger's tables or messages change. Format 1 has no journal. A ledger whose key
# was changed has a table more, by which versions that do not know of that refuse it.
FORMAT = 2


@dataclass(frozen=True)
class Meta:
    """The description of a run.

    adapter_seed: seed of the empty adapter.  model: see ``engine.files.fingerprint``.
    noise_seed: seed of differential privacy's noise; secret.  format: 1 or ``FORMAT``.
    shards: processes that take the reports, see ``protocol.shards``; 0: the server itself.
    """

    config: FederationConfig
    architecture: str
    lora: LoRAConfig
    targets: tuple[Target, ...]
    head: Head | None
    adapter_seed: int
    model: dict[str, Any]
    noise_seed: int
    format: int = FORMAT
    shards: int = 0

    def __post_init__(self) -> None:
        if self.shards:
            check_shards(self.config, self.shards)

    @property
    def sums_alone(self) -> bool:
        """Whether the ledger has sums of clients' scalars, and no reports of one."""
        return self.config.secure or self.shards > 0

    @staticmethod
    def of(
        config: FederationConfig,
        adapter: Adapter,
        adapter_seed: int,
        model: dict[str, Any],
        noise_seed: int,
        shards: int = 0,
    ) -> Meta:
        """The description of a run whose empty adapter has the shape of ``adapter``."""
        a = adapter
        return Meta(
            config,
            a.architecture,
            a.config,
            a.targets,
            a.head,
            adapter_seed,
            model,
            noise_seed,
            shards=shards,
        )

    def empty_adapter(self) -> Adapter:
        """The adapter before the first round."""
        return Adapter.empty(
            self.architecture, self.targets, self.lora, self.adapter_seed, cpu, self.head
        )

    def difference(self, other: Meta) -> str | None:
        """Where two descriptions of a run differ; see the function ``difference``.

        The noise_seed and the format are those of the ledger, and no part of the comparison.
        """
        mine = dataclasses.replace(self, noise_seed=other.noise_seed, format=other.format)
        saved, given = json.loads(mine.to_json()), json.loads(other.to_json())
        # The model with what a simulation has beside it first: a channel changes the config, too.
        return difference(saved["model"], given["model"], "model") or difference(saved, given)

    def to_json(self) -> str:
        """As JSON, with the versions that ``from_json`` checks."""
        fields = dataclasses.asdict(self)
        versions = {"format": fields.pop("format"), "layout_version": LAYOUT_VERSION}
        fields |= {"config": self.config.recorded(), "lora": self.lora.recorded()}
        if not self.shards:  # as older versions do
            del fields["shards"]
        return json.dumps({**versions, **fields})

    @staticmethod
    def from_json(text: str) -> Meta:
        """The inverse of ``to_json``; KeyError, TypeError or ValueError for anything else."""
        raw = json.loads(text)
        if raw["format"] not in (1, FORMAT) or raw["layout_version"] != LAYOUT_VERSION:
            raise ValueError(f"it is of format {raw['format']}.{raw['layout_version']}")
        return Meta(
            FederationConfig.from_recorded(raw["config"]),
            raw["architecture"],
            LoRAConfig(**raw["lora"]),
            tuple(Target(**target) for target in raw["targets"]),
            Head(**raw["head"]) if raw["head"] else None,
            raw["adapter_seed"],
            raw["model"],
            raw["noise_seed"],
            raw["format"],
            raw.get("shards", 0),
        )


@dataclass(frozen=True)
class Round:
    """A closed round.

    closed: time.  message: the encoded update, None where clients upload weights.  loss: mean of
    the clients' losses.  first_variance, variance: after the first part and at the end.
    theta: SHA-256 of the adapter's parameters after the round.  snapshot: SHA-256 of the state
    after the round, None if the state is not kept.  hash: covers everything up to this round that
    determines the state; not times, rejections, evaluations and bytes sent, which the journal has.
    """

    round: int
    closed: float
    message: bytes | None
    loss: float | None
    first_variance: float | None
    variance: float | None
    n_perturbations: int
    theta: bytes
    snapshot: bytes | None = None
    hash: bytes = b""


def round_hash(
    before: bytes,
    closed: Round,
    parts: Iterable[tuple[int, int, Sequence[tuple[int, bytes]], Sequence[tuple[int, bytes]]]],
) -> bytes:
    """SHA-256 over the hash of the round before, or the run's description, and a round's data.

    parts: each with its number, clients available, and by client the messages of assignments and
    contributions. The other data are the update, figures, and hashes of theta and the snapshot.
    """
    digest = hashlib.sha256(before)

    def feed(*numbers: int) -> None:
        for number in numbers:
            digest.update(number.to_bytes(8, "little"))

    for part, n_available, *messages in parts:
        feed(closed.round, part, n_available)
        for rows in messages:
            feed(len(rows))
            for client, message in rows:
                feed(client, len(message))
                digest.update(message)
    update = closed.message or b""
    feed(len(update))
    digest.update(update)
    figures = (closed.loss, closed.first_variance, closed.variance, closed.n_perturbations)
    digest.update(repr(figures).encode())
    digest.update(closed.theta)
    digest.update(closed.snapshot or b"")
    return digest.digest()


def difference(saved: Any, given: Any, key: str = "") -> str | None:
    """The first place where two JSON values differ, as "key is x here but y"."""
    if isinstance(saved, dict) and isinstance(given, dict):
        for name in sorted({*saved, *given}):
            inner = f"{key}.{name}" if key else name
            found = difference(saved.get(name), given.get(name), inner)
            if found is not None:
                return found
        return None
    return None if saved == given else f"{key} is {given!r}, but {saved!r}"
