"""Settings of federated runs: what is refused, with which words, and the papers' presets."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest

from fwdllm.engine.errors import ConfigError
from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.presets import PRESETS, preset
from fwdllm.protocol.settings import OPTIMIZERS

INTEGERS = {
    "rounds": 1,
    "per_round": 1,
    "pool_size": 1,
    "perturbations": 1,
    "head_perturbations": 1,
    "batch_size": 1,
    "max_tokens": 2,
    "dimension": 1,
    "reselect": 1,
    "local_steps": 1,
    "calibration_rounds": 1,
    "max_parts": 1,
    "candidates": 1,
    "warmup": 0,
    "eval_every": 0,
    "snapshot_every": 1,
    "seed": 0,
}
# Numbers that are too large by any reading: of seeds, parts, bytes on the wire.
TOO_LARGE = {
    "rounds": 2**32,
    "per_round": 2**22 + 1,
    "pool_size": 2**28 + 1,
    "perturbations": 2**16,
    "head_perturbations": 2**16,
    "batch_size": 2**32,
    "local_steps": 2**16,
    "max_parts": 65,
    "candidates": 2**22,
    "seed": 2**64,
}
POSITIVE = (
    "epsilon",
    "client_learning_rate",
    "variance_threshold",
    "clip",
    "learning_rate",
    "head_learning_rate",
    "eps",
    "max_derivative",
    "deadline",
)
NOT_NEGATIVE = ("sigma", "weight_decay", "momentum", "beta1", "beta2", "trim")
BELOW = {"momentum": 1.0, "beta1": 1.0, "beta2": 1.0, "trim": 0.5, "delta": 1.0}
CHOICES = (
    "upload",
    "seeds",
    "method",
    "directions",
    "client_optimizer",
    "aggregate",
    "optimizer",
    "schedule",
)
SHARES = ("quorum", "keep")
FLAGS = ("split", "adaptive", "weighted", "pacing", "secure", "literal")
NOT_NUMBERS = ("1", True, False, [1], {}, 1j)


def make(**changes: Any) -> FederationConfig:
    return FederationConfig(**{"rounds": 10, **changes})


def assert_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} must be "):
        make(**{name: value})


def test_every_setting_is_in_one_of_these_tables() -> None:
    # So that a new setting cannot come without a look at its bad values.
    known = {*INTEGERS, *POSITIVE, *NOT_NEGATIVE, *BELOW, *CHOICES, *FLAGS, *SHARES}
    assert {field.name for field in fields(FederationConfig)} == known


@pytest.mark.parametrize("name", INTEGERS)
def test_whole_numbers_from_the_least_on(name: str) -> None:
    assert getattr(make(**{name: INTEGERS[name]}), name) == INTEGERS[name]
    for value in (INTEGERS[name] - 1, -1, 1.5, 2.0, math.nan, math.inf, *NOT_NUMBERS):
        assert_refused(name, value)
    if name != "max_tokens":
        assert_refused(name, None)


@pytest.mark.parametrize("name", TOO_LARGE)
def test_numbers_beyond_what_seeds_and_messages_hold(name: str) -> None:
    assert_refused(name, TOO_LARGE[name])


@pytest.mark.parametrize("name", [*POSITIVE, *NOT_NEGATIVE, *BELOW, *SHARES])
def test_numbers_that_are_none(name: str) -> None:
    for value in (math.nan, math.inf, -math.inf, -1e-9, *NOT_NUMBERS):
        assert_refused(name, value)
    if name not in ("variance_threshold", "head_learning_rate", "eps", "weight_decay"):
        assert_refused(name, None)


@pytest.mark.parametrize("name", [*POSITIVE, *SHARES, "delta"])
def test_numbers_above_zero(name: str) -> None:
    assert_refused(name, 0)
    assert_refused(name, 0.0)
    assert getattr(make(**{name: 1e-5}), name) == 1e-5


@pytest.mark.parametrize("name", NOT_NEGATIVE)
def test_numbers_from_zero_on(name: str) -> None:
    assert getattr(make(**{name: 0.0}), name) == 0


@pytest.mark.parametrize("name", BELOW)
def test_numbers_below_a_border(name: str) -> None:
    assert_refused(name, BELOW[name])
    inside = math.nextafter(BELOW[name], 0)
    assert getattr(make(**{name: inside}), name) == inside


def test_a_share_may_be_all_and_a_derivative_no_more_than_float32() -> None:
    for name in SHARES:
        assert getattr(make(**{name: 1}), name) == 1
        assert_refused(name, 1.0000001)
    assert make(max_derivative=3e38).max_derivative == 3e38
    assert_refused("max_derivative", 3.5e38)


@pytest.mark.parametrize("name", [*POSITIVE, *NOT_NEGATIVE, *BELOW, *SHARES])
def test_whole_numbers_too_large_for_a_float(name: str) -> None:
    for value in (10**400, -(10**400), 2**1024):
        assert_refused(name, value)


@pytest.mark.parametrize("name", INTEGERS)
def test_whole_numbers_too_large_for_anything(name: str) -> None:
    for value in (10**400, -(10**400)):
        assert_refused(name, value)


def test_as_many_head_perturbations_as_a_report_can_hold() -> None:
    assert make(head_perturbations=2**16 - 1).head_perturbations == 65535


def test_rounds_to_calibrate_pacing_by_are_20() -> None:
    assert make().calibration_rounds == 20


@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_true_or_false(name: str) -> None:
    for value in (0, 1, "true", None, 1.0):
        assert_refused(name, value)


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_listed(name: str) -> None:
    for value in ("", "Normal", None, 3, ["scalars"]):
        assert_refused(name, value)
    with pytest.raises(ConfigError, match=str(getattr(make(), name))):
        make(**{name: "none such"})


def test_directions_that_need_the_model_are_not_for_a_server() -> None:
    assert_refused("directions", "lora-xs")


PRIVATE = {"sigma": 1.0, "seeds": "shared", "weighted": False}
PROJECTED = {"upload": "projection", "method": "backprop", "local_steps": 3}
CONTRADICTIONS = {
    "scalars and local steps": ({"local_steps": 2}, "one local step"),
    "steps of adam": ({"upload": "steps", "client_optimizer": "adam"}, "sgd alone.*for adam"),
    "steps of adamw": ({"upload": "steps", "client_optimizer": "adamw"}, "sgd alone.*for adamw"),
    "a pool for scalars": ({"seeds": "pool"}, "pool of seeds"),
    "a pool for projections": (
        {"seeds": "pool", "upload": "projection", "method": "backprop"},
        "^a pool of seeds is for local steps along them",
    ),
    "a weighted pool for scalars": ({"seeds": "weighted-pool"}, "^a pool of seeds"),
    "a weighted pool for weights": (
        {"seeds": "weighted-pool", "upload": "weights"},
        "^a weighted pool goes by scalars",
    ),
    "a projection of tangents' steps": (
        {"upload": "projection"},
        "^a projection is .* method is backprop or readout, and not forward-ad",
    ),
    "a median of projections on own seeds": (
        {"upload": "projection", "method": "backprop", "aggregate": "median"},
        "^median compares clients",
    ),
    "a median of own seeds": ({"aggregate": "median"}, "^median compares clients"),
    "a trimmed mean of own seeds": ({"aggregate": "trimmed"}, "^trimmed compares clients"),
    "a median of steps": (
        {"aggregate": "median", "upload": "steps", "seeds": "shared"},
        "^median compares clients",
    ),
    "bounded scalars of shared seeds": (
        {"aggregate": "bounded", "seeds": "shared"},
        "^bounded is for scalars along seeds of a client's own",
    ),
    "screened weights": (
        {"aggregate": "screened", "upload": "weights"},
        "^screened is for scalars",
    ),
    "a split of lora-fa": ({"split": True, "directions": "lora-fa"}, "split.*lora-fa"),
    "a split of subzero": ({"split": True, "directions": "subzero"}, "split.*subzero"),
    "sparse weights": ({"directions": "sparse", "upload": "weights"}, "sparse are chosen by.*scal"),
    "steps of spiel": (
        {"directions": "spiel", "upload": "steps"},
        "spiel are chosen by .* scalars",
    ),
    "paced sparse directions": ({"directions": "spiel", "pacing": True}, "one threshold"),
    "a run that ends before a choice": (
        {"directions": "sparse", "reselect": 40},
        "10 rounds are over before directions sparse have been chosen, after 10",
    ),
    "pacing of weights": ({"pacing": True, "upload": "weights"}, "^pacing compares scalars"),
    "pacing of one shared perturbation": (
        {"pacing": True, "seeds": "shared", "perturbations": 1},
        "^pacing compares two halves",
    ),
    "pacing of steps along shared seeds": (
        {"pacing": True, "upload": "steps", "local_steps": 2, "seeds": "shared"},
        "^pacing cannot tell the halves",
    ),
    "candidates of shared seeds": ({"candidates": 2, "seeds": "shared"}, "candidates"),
    "candidates of a pool": (
        {"candidates": 2, "seeds": "pool", "upload": "steps"},
        "candidates",
    ),
    "privacy of own seeds": ({**PRIVATE, "seeds": "own"}, "^differential privacy adds"),
    "privacy of weights": ({**PRIVATE, "upload": "weights"}, "^differential privacy adds"),
    "privacy of steps": ({**PRIVATE, "upload": "steps"}, "^differential privacy adds"),
    "privacy of a median": ({**PRIVATE, "aggregate": "median"}, "^differential privacy adds"),
    "privacy by weights of clients": ({**PRIVATE, "weighted": True}, "counts all clients alike"),
    "privacy of a split": ({**PRIVATE, "split": True}, "same scope"),
    "privacy and pacing": ({**PRIVATE, "pacing": True}, "number of releases"),
    "a warmup beyond the end": ({"warmup": 11}, "warmup 11 .* 10 rounds"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_told_in_a_sentence(name: str) -> None:
    changes, sentence = CONTRADICTIONS[name]
    with pytest.raises(ConfigError, match=sentence):
        make(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"upload": "steps", "local_steps": 2},
        {"upload": "weights", "local_steps": 2, "client_optimizer": "adamw"},
        {"upload": "weights", "aggregate": "median"},
        {"upload": "weights", "seeds": "pool"},
        {"seeds": "shared", "aggregate": "trimmed"},
        {"seeds": "shared", "perturbations": 2, "pacing": True},
        {"perturbations": 1, "pacing": True},
        {"upload": "steps", "local_steps": 2, "pacing": True},
        {"upload": "steps", "local_steps": 2, "seeds": "pool", "pacing": True},
        {"upload": "steps", "local_steps": 2, "seeds": "shared"},
        {"upload": "steps", "local_steps": 2, "seeds": "weighted-pool", "pacing": True},
        {**PROJECTED, "client_optimizer": "adam", "split": True},
        {**PROJECTED, "seeds": "shared", "aggregate": "trimmed", "pacing": True},
        {**PROJECTED, "candidates": 2, "pacing": True},
        {**PROJECTED, **PRIVATE},
        {"aggregate": "bounded", "split": True},
        {"aggregate": "screened", "pacing": True},
        {"aggregate": "screened", "upload": "steps", "local_steps": 2, "seeds": "pool"},
        {"candidates": 2},
        {"split": True, "directions": "rademacher"},
        {"split": True, "directions": "spiel", "reselect": 36},
        PRIVATE,
        {"warmup": 10},
    ],
    ids=str,
)
def test_what_does_not_contradict_itself_is_taken(changes: dict[str, Any]) -> None:
    assert make(**changes)


def test_a_config_keeps_its_checks_when_replaced() -> None:
    with pytest.raises(ConfigError, match="one local step"):
        replace(make(), local_steps=2)


def test_optimizers_get_their_settings() -> None:
    config = make(
        optimizer="yogi",
        learning_rate=0.1,
        momentum=0.2,
        beta1=0.3,
        beta2=0.4,
        eps=0.5,
        weight_decay=0.6,
        upload="weights",
        client_optimizer="adamw",
        client_learning_rate=0.7,
    )
    assert (config.eps_in_use, config.weight_decay_in_use) == (0.5, 0.6)
    client = config.client_optimizer_config()
    assert (client.optimizer, client.learning_rate) == ("adamw", 0.7)
    assert (client.eps_in_use, client.weight_decay_in_use) == (1e-8, 0)


def test_what_is_not_said_is_the_optimizers_own() -> None:
    found = {name: make(optimizer=name) for name in OPTIMIZERS}
    eps = {name: config.eps_in_use for name, config in found.items()}
    assert eps == {**dict.fromkeys(OPTIMIZERS, 1e-8), "yogi": 1e-3}
    decay = {name: config.weight_decay_in_use for name, config in found.items()}
    assert decay == {**dict.fromkeys(OPTIMIZERS, 0.0), "adamw": 0.01}
    assert make(optimizer="yogi").recorded()["eps"] == 1e-3


# Presets


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_config_of_its_settings(name: str) -> None:
    config = preset(name, rounds=3)
    assert config.rounds == 3
    assert {key: getattr(config, key) for key in PRESETS[name]} == PRESETS[name]


def test_changes_go_over_a_preset() -> None:
    config = preset("fwdllm", rounds=3, per_round=7, seed=5)
    assert (config.per_round, config.seed, config.candidates) == (7, 5, 10)


def test_presets_do_what_their_papers_did() -> None:
    fwdllm, spry = preset("fwdllm", rounds=1), preset("spry", rounds=1)
    assert (fwdllm.method, fwdllm.epsilon, fwdllm.pacing) == ("central", 0.01, True)
    assert (fwdllm.candidates, fwdllm.perturbations, fwdllm.max_tokens) == (10, 1, 64)
    assert (spry.method, spry.split, spry.optimizer) == ("forward-ad", True, "yogi")
    assert preset("spry-epoch", rounds=1).upload == "weights"
    fedkseed = preset("fedkseed", rounds=1)
    assert (fedkseed.seeds, fedkseed.pool_size, fedkseed.upload) == ("pool", 4096, "steps")
    pro = preset("fedkseed-pro", rounds=1)
    assert pro == replace(fedkseed, seeds="weighted-pool")
    ferret = preset("ferret", rounds=1)
    assert (ferret.upload, ferret.method, ferret.perturbations) == ("projection", "backprop", 4096)
    dpzero = preset("dpzero", rounds=1)
    assert dpzero.sigma > 0
    assert dpzero.seeds == "shared"
    assert preset("p-rge", rounds=1).directions == "lora-fa"
    assert preset("mezo", rounds=1).method == "central"


def test_an_unknown_preset_is_told_which_there_are() -> None:
    with pytest.raises(ConfigError, match=r"fwdllm, spry.*there is no 'sprry'"):
        preset("sprry", rounds=1)


def test_an_unknown_setting_of_a_preset_is_named() -> None:
    with pytest.raises(ConfigError, match="there is no setting 'learning_rat'"):
        preset("spry", rounds=1, learning_rat=1.0)


def test_a_preset_with_a_bad_change_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^sigma must be"):
        preset("dpzero", rounds=1, sigma=-1.0)
    with pytest.raises(ConfigError, match="same scope"):
        preset("dpzero", rounds=1, split=True)


def test_a_preset_without_rounds_is_refused() -> None:
    for name in PRESETS:
        with pytest.raises(ConfigError, match="rounds"):
            preset(name)


def test_what_an_older_version_recorded_is_as_it_was() -> None:
    """It took names of special tokens in raw text as text, and did not say so."""
    older = make().recorded() | {"rounds": 3}
    assert older.pop("literal") is False
    config = FederationConfig.from_recorded(older)
    assert config.literal
    assert config.recorded() == older
    assert not FederationConfig.from_recorded(make().recorded()).literal
