"""Exceptions a user can cause. Each message is one sentence that says what to do about it.

The command line prints the message and exits with code 2; library users catch the type.
"""

import math
from pathlib import Path


class FwdllmError(Exception):
    """Base of everything raised on purpose."""


class ModelError(FwdllmError):
    """A model file that cannot be read, is damaged, or is of an unsupported kind."""


class UnsupportedError(ModelError):
    """A valid model file with something that our own graphs do not support. reason: what it is."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


class DataError(FwdllmError):
    """Training or evaluation data that cannot be used; the message names file and line."""


class TextError(DataError):
    """A text that cannot be tokenized."""


class TooLongError(DataError):
    """A text that is longer than the model's context. where: its place.  n_tokens: its length."""

    def __init__(self, where: str, n_tokens: int, context: int) -> None:
        super().__init__(
            f"{where}: the example has {n_tokens} tokens, but the model's context is "
            f"{context}; shorten it or set a maximum number of tokens to cut it"
        )
        self.where, self.n_tokens, self.context = where, n_tokens, context


class AdapterError(FwdllmError):
    """An adapter file that cannot be read or does not fit the model."""


class ConfigError(FwdllmError):
    """An option value, target or combination of options that makes no sense."""


class LlamaCppError(FwdllmError):
    """A llama.cpp that cannot be used on this machine."""


class NumericsError(FwdllmError):
    """A loss or derivative that is not finite."""


class FwdllmWarning(UserWarning):
    """Something to know although it works; the command line prints it as a sentence."""


def finite(loss: float) -> float:
    """A loss as it is; NumericsError if it is not a finite number."""
    if not math.isfinite(loss):
        raise NumericsError(f"the loss is {loss}: the model or the adapter is out of range")
    return loss
