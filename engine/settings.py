"""Settings: what each is for and which values it takes, said once.

Configurations are dataclasses whose fields carry a ``Setting``. The command line, the HTTP server
and files of settings are generated from it, and ``check`` checks values against it. Nothing here is
slow to import, so that the command line can show its help at once.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fwdllm.engine.errors import ConfigError

# Slopes along directions are measured, or are products with a gradient that is exact.
SLOPE_METHODS = ("forward-ad", "central", "forward-difference")
EXACT_METHODS = ("backprop", "readout")
METHODS = SLOPE_METHODS + EXACT_METHODS
# Of these and of ``estimators.activation``, those that need a graph of our own.
OWN_METHODS = ("forward-ad", "backprop", "activation")
DIRECTIONS = ("normal", "rademacher", "lora-fa", "lora-xs", "subzero", "sparse", "spiel")

# Step along a direction of unit variance per parameter; docs/decisions.md has the sweep.
DEFAULT_EPSILON = 1e-3

_KINDS = {kind.__name__: kind for kind in (int, float, bool, str, tuple)}
# Larger than every finite float.
_LARGEST = 2**1024


@dataclass(frozen=True)
class Setting:
    """Describes a field of a configuration.

    help: a sentence, with the unit if there is one.  low, high: bounds of a number; they are
    allowed values themselves unless ``open`` has "l" or "h".  choices: the allowed strings.  flags:
    of the command line, "--name" if there are none.  shown: the default as help texts give it, if
    it depends on the recipe; else None.
    """

    help: str
    low: float = -math.inf
    high: float = math.inf
    open: str = ""
    choices: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    shown: str | None = None


def setting(default: Any, help: str, **facts: Any) -> Any:
    """A dataclass field with a ``Setting``; facts: its other fields."""
    return dataclasses.field(default=default, metadata=described(help, **facts))


def described(help: str, **facts: Any) -> dict[str, Setting]:
    """The metadata of a field without a default."""
    return {"setting": Setting(help, **facts)}


def settings_of(config: type) -> Mapping[str, Setting]:
    """The settings of a configuration by name, in the order of its fields."""
    found = {field.name: field.metadata.get("setting") for field in dataclasses.fields(config)}
    return {name: known for name, known in found.items() if known is not None}


def types_of(config: type) -> Mapping[str, tuple[type, bool]]:
    """The type of each setting (int, float, bool, str or tuple), and whether it may be None."""
    found = {}
    for field in dataclasses.fields(config):
        if "setting" in field.metadata:
            kind, *none = str(field.type).split(" | ")
            found[field.name] = (_KINDS[kind.partition("[")[0]], bool(none))
    return found


def check(config: Any) -> None:
    """ConfigError for the first value that its setting does not allow."""
    kinds = types_of(type(config))
    for name, known in settings_of(type(config)).items():
        value, (kind, optional) = getattr(config, name), kinds[name]
        if value is None and optional:
            continue
        if kind is int:
            _check_integer(name, value, known)
        elif kind is float:
            _check_number(name, value, known)
        elif kind is bool and not isinstance(value, bool):
            raise ConfigError(f"{name} must be true or false, not {value!r}")
        elif known.choices and value not in known.choices:
            raise ConfigError(f"{name} must be one of {', '.join(known.choices)}, not {value!r}")


def _check_integer(name: str, value: Any, known: Setting) -> None:
    if not is_whole(value) or not known.low <= value <= known.high:
        raise ConfigError(
            f"{name} must be a whole number from {known.low:.0f} to {known.high:.0f}, not {value!r}"
        )


def _check_number(name: str, value: Any, known: Setting) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    inside = is_number and known.low <= value <= known.high and abs(value) < _LARGEST
    at_low, at_high = "l" in known.open, "h" in known.open
    if inside and not (at_low and value == known.low) and not (at_high and value == known.high):
        return
    limit = f"{'above' if at_low else 'at least'} {known.low:g}"
    if known.high != math.inf:
        limit += f" and {'below' if at_high else 'at most'} {known.high:g}"
    raise ConfigError(f"{name} must be a number {limit}, not {value!r}")


@dataclass(frozen=True)
class LoRAConfig:
    """What to adapt.

    rank: columns of B and rows of A, at least 1.  alpha: the adapter adds alpha / rank * B A;
    kept at float32 precision because that is what a GGUF file holds.  targets: GGUF tensor
    names without "blk.N." and ".weight"; their order carries no meaning, they are sorted.
    layers: the layers to adapt, None for all.  rslora: the factor is alpha / sqrt(rank), which
    keeps what high ranks learn in a step as large as what low ones do.  Errors: ConfigError.
    """

    rank: int = setting(
        8,
        "Rank of the LoRA factors.",
        low=1,
        shown="8, readout 32, activation one less than labels",
    )
    alpha: float = setting(
        16.0,
        "The adapter adds alpha / rank * B A.",
        low=0,
        open="l",
        shown="16, readout 64, activation rank",
    )
    targets: tuple[str, ...] = setting(
        ("attn_q", "attn_v"),
        "Tensors to adapt; inspect lists them.",
        shown="attn_q,attn_v or what the model has in their place; "
        "readout ffn_down, activation attn_v,attn_output,ffn_up,ffn_down",
    )
    layers: tuple[int, ...] | None = setting(
        None, 'Layers to adapt, such as "4-5" or "0,2".', shown="all, readout the last"
    )
    rslora: bool = setting(
        False, "Scale by alpha / sqrt(rank) instead, for high ranks (rsLoRA, arXiv 2312.03732)."
    )

    def __post_init__(self) -> None:
        if not is_whole(self.rank) or self.rank < 1:
            raise ConfigError(f"LoRA rank must be a whole number of at least 1, not {self.rank!r}")
        object.__setattr__(self, "alpha", _checked_alpha(self.alpha))
        object.__setattr__(self, "targets", _checked_targets(self.targets))
        if self.layers is not None:
            object.__setattr__(self, "layers", _checked_layers(self.layers))
        if not isinstance(self.rslora, bool):
            raise ConfigError(f"rslora must be true or false, not {self.rslora!r}")

    @property
    def scale(self) -> float:
        """The factor in front of B A."""
        return self.file_alpha / self.rank

    @property
    def file_alpha(self) -> float:
        """What files of adapters hold as alpha: they mean the factor alpha / rank."""
        return _checked_alpha(self.alpha * math.sqrt(self.rank)) if self.rslora else self.alpha

    def recorded(self) -> dict[str, Any]:
        """As a ledger keeps it: ``rslora``, which older versions do not know, if it is set."""
        fields = dataclasses.asdict(self)
        return fields if self.rslora else {k: v for k, v in fields.items() if k != "rslora"}


class _Target(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def layer(self) -> int: ...


T = TypeVar("T", bound=_Target)


@dataclass(frozen=True)
class Scope:
    """The part of an adapter that perturbations touch. None is all.

    layers: block numbers.  targets: tensor names without "blk.N." and ".weight".
    """

    layers: tuple[int, ...] | None = None
    targets: tuple[str, ...] | None = None

    def __str__(self) -> str:
        layers = "all layers" if self.layers is None else f"layers {_listed(self.layers)}"
        return layers if self.targets is None else f"{_listed(self.targets)} of {layers}"

    def of(self, targets: Sequence[T]) -> tuple[T, ...]:
        """Those of an adapter's targets that are in the scope; ConfigError if there are none."""
        inside = tuple(t for t in targets if self._has(t))
        if not inside:
            raise ConfigError(f"nothing of the adapter is in the scope of {self}")
        return inside

    def _has(self, target: _Target) -> bool:
        name = target.name.split(".", 2)[2]
        in_layers = self.layers is None or target.layer in self.layers
        return in_layers and (self.targets is None or name in self.targets)


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


@dataclass(frozen=True)
class DirectionsConfig:
    """Which directions a run uses; ``engine.directions.make`` makes them.

    kind: one of DIRECTIONS.  dimension: of subzero's subspaces.  keep: share that is trained, of
    the parameters by sparse, of the entries of the chosen columns by spiel; above 0 and at most 1.
    reselect: see ``estimating``.  scope: the part of the adapter that is trained.
    Errors: ConfigError.
    """

    kind: str = setting(
        "normal", f"{', '.join(DIRECTIONS[:-1])} or {DIRECTIONS[-1]}.", flags=("--directions",)
    )
    dimension: int = setting(8, "Of subzero's subspaces.", low=1, high=2**28)
    keep: float = setting(0.1, "Share that sparse or spiel trains.", low=0, high=1, open="l")
    reselect: int = setting(40, "Updates between choices of what spiel trains.", low=1, high=2**28)
    scope: Scope | None = None

    def __post_init__(self) -> None:
        check(self)
        if self.kind not in DIRECTIONS:
            raise ConfigError(f"directions are {', '.join(DIRECTIONS)}, not {self.kind!r}")


def estimating(reselect: int) -> int:
    """How many updates before a choice of what is trained estimate all that could be.

    reselect: updates from one choice to the next, at least 1.
    """
    return max(1, reselect // 4)


def is_whole(value: object) -> bool:
    """Whether it is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _checked_alpha(alpha: float) -> float:
    try:
        (stored,) = struct.unpack("<f", struct.pack("<f", float(alpha)))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"LoRA alpha must be a number, not {alpha!r}") from error
    except OverflowError:
        stored = math.inf
    if not (math.isfinite(stored) and stored > 0):
        raise ConfigError(f"LoRA alpha must be a positive number, not {alpha!r}")
    return stored


def _checked_targets(targets: Sequence[str]) -> tuple[str, ...]:
    if not _is_list(targets) or not all(isinstance(name, str) for name in targets):
        raise ConfigError(f"LoRA targets must be a list of tensor names, not {targets!r}")
    if not targets or len(set(targets)) != len(targets):
        raise ConfigError("LoRA needs at least one target and no target twice")
    return tuple(sorted(targets))


def _checked_layers(layers: Sequence[int]) -> tuple[int, ...]:
    if not _is_list(layers) or not all(is_whole(layer) and layer >= 0 for layer in layers):
        raise ConfigError(f"LoRA layers must be block numbers from 0 up, not {layers!r}")
    if not layers or len(set(layers)) != len(layers):
        raise ConfigError("LoRA needs at least one layer and no layer twice")
    return tuple(sorted(layers))
