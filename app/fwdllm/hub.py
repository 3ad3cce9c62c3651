"""Models by name: a path, or hf://owner/repo/file.gguf on the Hugging Face Hub."""

from __future__ import annotations

import os
from pathlib import Path

from fwdllm.engine.errors import ConfigError, ModelError
from fwdllm.engine.gguf.split import names_beside

SCHEME = "hf://"


def local_path(model: str | os.PathLike[str]) -> Path:
    """The local file of a model. A file on the Hub is downloaded once, into the Hub's own cache;
    with the first file of a split model come the others.

    Errors: ConfigError for a name that is not hf://owner/repo/file.gguf or if huggingface_hub
    is not installed, ModelError if the download fails. Whether a path exists is not checked.
    """
    name = os.fspath(model)
    if not name.startswith(SCHEME):
        return Path(name)
    owner, repo, file = _parts(name)
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ConfigError(
            f"{name} is on the Hugging Face Hub, and downloading from there needs "
            "huggingface_hub; install it with: pip install 'fwdllm[hub]'"
        ) from None
    try:
        folder, _, own = file.rpartition("/")
        names = [f"{folder}/{each}".lstrip("/") for each in names_beside(own)]
        found = {each: Path(hf_hub_download(f"{owner}/{repo}", each)) for each in names}
        return found[file]
    except Exception as error:  # network, access and cache errors of several libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"cannot download {name}: {reason}") from error


def _parts(name: str) -> tuple[str, str, str]:
    parts = name.removeprefix(SCHEME).split("/", 2)
    if len(parts) != 3 or not all(parts) or not parts[2].endswith(".gguf"):
        raise ConfigError(f"{name} does not name a file; write hf://owner/repo/file.gguf")
    owner, repo, file = parts
    return owner, repo, file
