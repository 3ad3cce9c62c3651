"""The settings of a federated run, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fwdllm.engine.errors import ConfigError
from fwdllm.engine.settings import (
    EXACT_METHODS,
    DirectionsConfig,
    check,
    described,
    estimating,
    setting,
    settings_of,
)
from fwdllm.protocol.settings import (
    MAX_INDEX,
    MAX_ROUNDS,
    OPTIMIZERS,
    EstimatorConfig,
    OptimizerConfig,
    ScheduleConfig,
)

WEIGHTED_POOL = "weighted-pool"
POOLS = ("pool", WEIGHTED_POOL)
SEEDS = ("own", "shared", *POOLS)
UPLOADS = ("scalars", "steps", "projection", "weights")
AGGREGATES = ("mean", "bounded", "screened", "trimmed", "median")
# The server holds no model weights, so directions that need weights are left out; the sparse ones,
# which need data elsewhere, are chosen here by the clients' slopes.
SPARSE_DIRECTIONS = ("sparse", "spiel")
FEDERATED_DIRECTIONS = ("normal", "rademacher", "lora-fa", "subzero", *SPARSE_DIRECTIONS)

# Flags that came after the first ledgers.
_LATER = ("adaptive", "secure")

MAX_PARTS = 64
MAX_CLIENTS = 1 << 22
# The client that a part's sum stands for where clients' own answers are not seen.
COHORT = MAX_CLIENTS

# Sums as integers stay below it: 64 bits with a sign, 24 bits of them a fraction.
MOST_OF_A_SUM = 1 << 38


@dataclass(frozen=True, kw_only=True)
class FederationConfig(EstimatorConfig, OptimizerConfig, ScheduleConfig):
    """Everything a run's numbers depend on besides the model, the clients and their data.

    Each field carries its own description, see ``engine.settings.settings_of``. The fields of the
    estimator, the server's optimizer and the schedule are inherited. Some need more words:
    upload: what a client sends. "scalars": directional derivatives at the server's adapter.
    "steps": directional derivatives along local_steps of SGD at client_learning_rate, from which
    the server can repeat the steps. "weights": how far local_steps of client_optimizer moved the
    client's share of the adapter. "projection": the same, as its products with the directions of
    the client's seeds, one scalar each (Ferret); the steps are along exact gradients.
    seeds: "own", every client has directions of its own; "shared", all have the same; "pool", each
    local step draws from pool_size seeds fixed for the run (FedKSeed); "weighted-pool", it draws
    those more often whose scalars were large in the rounds before (FedKSeed-Pro).
    head_perturbations: directions of a classification head; they cost no forward pass, because the
    head's gradient is exact.  split: each client trains some layers, together all layers (Spry).
    adaptive: a slow client gets fewer perturbations, and with ``split`` later layers, which cost
    less, so that clients of a part take about equally long; as many perturbations in all.
    aggregate: "mean"; or, coordinate by coordinate, "median" or "trimmed": the mean without the
    share ``trim`` at either end. "median" and "trimmed" need shared seeds or uploaded weights.
    Where clients have directions of their own, "bounded" scales slopes down that are larger than
    others', and "screened" also counts clients less whose slopes agree with earlier gradients
    unlike the others'.
    pacing: ask for more perturbations of the same adapter, in at most max_parts parts, until the
    variance is at most variance_threshold.  variance_threshold: None: the median variance of the
    first calibration_rounds.
    keep, reselect: of directions "sparse" and "spiel", see ``protocol.selection``.
    secure: clients' scalars are added under masks, so that the server sees sums alone, of more than
    two thirds of a part's clients (``protocol.secure``). With sigma > 0 clients add the noise, too.
    clip, sigma, delta: client-level differential privacy (DPZero). clip bounds the L2 norm of a
    client's scalars; the sum over clients gets noise of standard deviation sigma * clip. A sigma of
    0 means no privacy.

    Raises ConfigError on a value that makes no sense.
    """

    rounds: int = field(
        kw_only=False, metadata=described("Updates in all.", low=1, high=MAX_ROUNDS - 1)
    )
    per_round: int = setting(10, "Clients asked in a part of a round.", low=1, high=MAX_CLIENTS)
    upload: str = setting("scalars", "What a client sends.", choices=UPLOADS)
    seeds: str = setting("own", "Whose directions are the same.", choices=SEEDS)
    pool_size: int = setting(4096, "Seeds of a pool.", low=1, high=MAX_INDEX)
    perturbations: int = setting(8, "Directions of a batch.", low=1, high=4096)
    head_perturbations: int = setting(
        64, "Directions of a classification head.", low=1, high=(1 << 16) - 1
    )
    directions: str = setting("normal", "What seeds mean.", choices=FEDERATED_DIRECTIONS)
    dimension: int = setting(
        DirectionsConfig.dimension,
        settings_of(DirectionsConfig)["dimension"].help,
        low=1,
        high=MAX_INDEX,
    )
    keep: float = setting(
        DirectionsConfig.keep,
        settings_of(DirectionsConfig)["keep"].help,
        low=0,
        high=1,
        open="l",
    )
    reselect: int = setting(
        DirectionsConfig.reselect,
        "Rounds between choices of what spiel trains; a fourth of them come before the first "
        "choice, spiel's or sparse's.",
        low=1,
        high=MAX_INDEX,
    )
    split: bool = setting(False, "Every client perturbs its share of the layers.")
    adaptive: bool = setting(False, "Slower clients get less to do.")
    local_steps: int = setting(1, "Steps of a client in a part.", low=1, high=4096)
    client_optimizer: str = setting("sgd", "Of local steps.", choices=OPTIMIZERS)
    client_learning_rate: float = setting(1e-3, "Of local steps.", low=0, open="l")
    aggregate: str = setting("mean", "How contributions become one.", choices=AGGREGATES)
    trim: float = setting(0.1, "Share left out at either end.", low=0, high=0.5, open="h")
    weighted: bool = setting(True, "Clients count by their examples.")
    pacing: bool = setting(False, "Ask for more until the variance is low.")
    variance_threshold: float | None = setting(
        None, "Of pacing.", low=0, open="l", shown="the median of the calibration"
    )
    calibration_rounds: int = setting(
        20, "Rounds that find the threshold.", low=1, high=MAX_ROUNDS - 1
    )
    max_parts: int = setting(5, "Parts of a round at most.", low=1, high=MAX_PARTS)
    candidates: int = setting(
        1, "Seeds of which the one along the last gradient is kept.", low=1, high=1000
    )
    secure: bool = setting(False, "The server sees sums of clients' scalars alone.")
    clip: float = setting(1.0, "L2 norm of a client's scalars.", low=0, open="l")
    sigma: float = setting(0.0, "Noise, in clips; 0 is none.", low=0)
    delta: float = setting(1e-5, "Of differential privacy.", low=0, high=1, open="lh")
    max_derivative: float = setting(
        1e4, "A scalar beyond it is refused.", low=0, high=3e38, open="l"
    )
    quorum: float = setting(
        0.5, "Share of those asked that closes a part.", low=0, high=1, open="l"
    )
    deadline: float = setting(600.0, "Seconds until a part closes.", low=0, open="l")
    eval_every: int = setting(10, "Rounds between evaluations.", low=0, high=MAX_ROUNDS - 1)
    snapshot_every: int = setting(10, "Rounds between snapshots.", low=1, high=MAX_ROUNDS - 1)

    def __post_init__(self) -> None:
        check(self)
        for wrong, sentence in self._contradictions():
            if wrong:
                raise ConfigError(sentence)

    @property
    def one_step_of_seeds(self) -> bool:
        """Whether a client's scalars are of one set of seeds, not of one for each local step."""
        return self.upload in ("scalars", "projection")

    @property
    def seed_steps(self) -> int:
        """Rows of an assignment's seeds."""
        return 1 if self.one_step_of_seeds else self.local_steps

    def _contradictions(self) -> list[tuple[bool, str]]:
        scalars, along_seeds = self.upload == "scalars", self.upload in ("steps", "weights")
        by_coordinate = self.aggregate in ("trimmed", "median")
        robust, private = self.aggregate != "mean", self.sigma > 0
        shared_scalars = self.one_step_of_seeds and self.seeds == "shared"
        sparse = self.directions in SPARSE_DIRECTIONS
        return [
            (
                scalars and self.local_steps != 1,
                "a client that uploads scalars makes one local step",
            ),
            (
                self.upload == "steps" and self.client_optimizer != "sgd",
                "the server can follow local steps of sgd alone; upload weights for "
                f"{self.client_optimizer}",
            ),
            (
                self.upload == "projection" and self.method not in EXACT_METHODS,
                f"a projection is of local steps along exact gradients, so its method is "
                f"{' or '.join(EXACT_METHODS)}, and not {self.method}",
            ),
            (
                self.seeds in POOLS and not along_seeds,
                "a pool of seeds is for local steps along them",
            ),
            (
                self.seeds == WEIGHTED_POOL and self.upload == "weights",
                "a weighted pool goes by scalars, which clients that upload weights do not send",
            ),
            (
                by_coordinate and not (self.upload == "weights" or shared_scalars),
                f"{self.aggregate} compares clients, so it needs shared seeds or weights; with "
                "seeds of their own there are bounded and screened",
            ),
            (
                robust
                and not by_coordinate
                and (self.upload == "weights" or self.seeds == "shared"),
                f"{self.aggregate} is for scalars along seeds of a client's own; with shared seeds "
                "or weights there are median and trimmed",
            ),
            (
                self.split and not sparse and self.directions not in ("normal", "rademacher"),
                f"layers cannot be split among clients with directions {self.directions}",
            ),
            (
                self.adaptive and self.seeds == "shared",
                "adaptive clients have perturbations of different number, so they need seeds of "
                "their own or of a pool",
            ),
            (
                self.adaptive and self.method in EXACT_METHODS,
                f"adaptive has nothing to adapt: any number of slopes of {self.method} costs the "
                "same",
            ),
            (
                self.adaptive
                and (self.per_round < 2 or (self.perturbations < 2 and not self.split)),
                "adaptive deals out the perturbations of a part again, so it needs two clients and "
                "two perturbations, or a split",
            ),
            (
                sparse and not scalars,
                f"directions {self.directions} are chosen by the clients' scalars: upload those",
            ),
            (
                sparse and self.pacing,
                f"pacing needs one threshold, and directions {self.directions} estimate now more "
                "parameters, now fewer",
            ),
            (
                sparse and self.rounds <= estimating(self.reselect),
                f"{self.rounds} rounds are over before directions {self.directions} have been "
                f"chosen, after {estimating(self.reselect)}: make more, or lower reselect",
            ),
            (
                self.pacing and self.upload == "weights",
                "pacing compares scalars, which clients that upload weights do not send",
            ),
            (
                self.pacing and self.seeds == "shared" and self.perturbations < 2,
                "pacing compares two halves of the perturbations, so it needs two of them",
            ),
            (
                self.pacing and self.seeds == "shared" and along_seeds,
                "pacing cannot tell the halves of local steps along shared seeds apart",
            ),
            (
                self.candidates > 1 and self.seeds != "own",
                "seeds are chosen among candidates where clients have their own",
            ),
            (
                private and (robust or not shared_scalars),
                "differential privacy adds clients' scalars, so it needs shared seeds and the mean",
            ),
            (private and self.weighted, "differential privacy counts all clients alike"),
            (private and self.split, "differential privacy needs clients with the same scope"),
            (
                private and self.pacing,
                "differential privacy fixes the number of releases, which pacing does not",
            ),
            (
                self.secure and (robust or not shared_scalars),
                "secure aggregation adds clients' scalars, so it needs shared seeds and the mean",
            ),
            (
                self.secure and self.split,
                "secure aggregation needs clients with the same scope",
            ),
            (
                self.secure and self.per_round < 3,
                "secure aggregation needs three clients a part: of two each would know the other's",
            ),
            (
                self.secure and self.per_round * self._largest_share > MOST_OF_A_SUM,
                f"secure sums have no room for {self.per_round} clients with scalars of that size; "
                "lower max_derivative",
            ),
            (
                self.warmup > self.rounds,
                f"warmup {self.warmup} is longer than the run of {self.rounds} rounds",
            ),
        ]

    @property
    def _largest_share(self) -> float:
        """What a client adds to a secure sum is below."""
        with_weight = self.batch_size * self.local_steps * self.max_derivative
        return max(with_weight, self.clip * (1 + 40 * self.sigma))

    def recorded(self) -> dict[str, Any]:
        """As ``OptimizerConfig.recorded``; what older versions do not know is left out if off."""
        fields = super().recorded()
        return {name: x for name, x in fields.items() if x or name not in _LATER}

    def client_optimizer_config(self) -> OptimizerConfig:
        """The clients' optimizer for local steps; without weight decay, as in the papers."""
        return OptimizerConfig(
            optimizer=self.client_optimizer,
            learning_rate=self.client_learning_rate,
            eps=1e-8,
            weight_decay=0.0,
        )
