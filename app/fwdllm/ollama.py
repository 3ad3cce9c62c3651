"""A folder that ``ollama create`` takes: a Modelfile, and the adapter or the merged model.

Modelfile: https://docs.ollama.com/modelfile. Ollama from 0.34.1 on refuses LoRA adapters, so that
it needs the merged model.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fwdllm.adapters import as_gguf
from fwdllm.engine.adapters.io import read_adapter
from fwdllm.engine.backends import choose
from fwdllm.engine.data.messages import Message
from fwdllm.engine.data.tokenizer import Tokenizer
from fwdllm.engine.errors import AdapterError, ConfigError, ModelError
from fwdllm.engine.files import atomic_write, check_destination
from fwdllm.engine.gguf.file import GGUFFile
from fwdllm.hub import local_path
from fwdllm.merging import Merged, merge

_Path = str | os.PathLike[str]

MODELFILE, ADAPTER, MODEL = "Modelfile", "adapter.gguf", "model.gguf"

_ADAPTERS = (
    "# Ollama 0.34.0 and older take this; newer ones refuse adapters: add --merge for a model "
    "that all take.\n"
)
_NO_TEMPLATE = (
    "# No TEMPLATE: the model's chat template cannot be written in Ollama's language here. Ollama\n"
    "# knows many itself; ollama show --template NAME says which one it has taken.\n"
)


def export_ollama(
    adapter: _Path, folder: _Path, model: _Path, merged: str | None, data: _Path | None = None
) -> Merged:
    """Write the Modelfile of a model with an adapter into a folder, and what it names.

    adapter: a GGUF file or PEFT folder.  model: a GGUF file or hf://owner/repo/file.gguf.
    merged: None: the adapter is written as a GGUF file, and the Modelfile names the model where it
    is. Otherwise the merged model is written, with changed tensors in this type, see
    ``merging.merge``.
    data: for a merged model: a JSONL file to evaluate before and after.
    Errors: those of ``merging.merge``.

    A folder is complete once it has its Modelfile: that of an earlier export is taken away before
    anything else changes, and put back if this one fails.
    """
    folder, base = Path(folder), local_path(model).absolute()
    if not all(character.isprintable() for character in str(base)):
        raise ConfigError(f"a Modelfile cannot name {str(base)!r}: rename the model")
    template = template_lines(base)
    is_new = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {folder}: {error.strerror}") from error
    modelfile = folder / MODELFILE
    check_destination(modelfile)
    before = modelfile.read_bytes() if modelfile.exists() else None
    modelfile.unlink(missing_ok=True)
    try:
        if merged is None:
            _write_adapter(adapter, folder / ADAPTER, base)
            result = Merged(folder, None, None)
            lines = f"{_ADAPTERS}FROM {base}\nADAPTER ./{ADAPTER}\n"
        else:
            made = merge(adapter, folder / MODEL, base, merged, data)
            result = Merged(folder, made.loss_before, made.loss_after)
            lines = f"FROM ./{MODEL}\n"
        with atomic_write(modelfile) as temporary:
            temporary.write_text(lines + template, encoding="utf-8")
    except BaseException:
        if before is not None:
            modelfile.write_bytes(before)
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return result


def _write_adapter(adapter: _Path, path: Path, model: Path) -> None:
    backend = choose(GGUFFile.open(model))
    with as_gguf(adapter, model) as gguf:
        args = backend.args
        stored = read_adapter(gguf, backend.architecture, args.n_heads, args.n_kv_heads)
        if stored.head is not None:
            raise AdapterError(f"{adapter} has a classification head, which Ollama does not know")
        if path.exists() and path.samefile(gguf):
            return
        with atomic_write(path) as temporary:
            shutil.copyfile(gguf, temporary)


@dataclass(frozen=True)
class Turns:
    """A chat template that puts fixed texts around every message.

    lead: before all, if the first message is not of the system.  before, after: by role.
    prompt: the opening of an answer.
    """

    lead: str
    before: dict[str, str]
    after: dict[str, str]
    prompt: str

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation with the opening of an answer."""
        lead = self.lead if messages[0]["role"] != "system" else ""
        turns = (self.before[m["role"]] + m["content"] + self.after[m["role"]] for m in messages)
        return lead + "".join(turns) + self.prompt

    def in_go(self) -> str:
        """As a template of Ollama's."""
        roles = [
            f'{{{{ if eq .Role "{role}" }}}}{self.before[role]}{{{{ .Content }}}}{self.after[role]}'
            "{{ end }}"
            for role in ("system", "user", "assistant")
        ]
        lead = f"{{{{ if not .System }}}}{self.lead}{{{{ end }}}}" if self.lead else ""
        return f"{lead}{{{{ range .Messages }}}}{''.join(roles)}{{{{ end }}}}{self.prompt}"


def template_lines(model: Path) -> str:
    """TEMPLATE and PARAMETER for a model, where they can be right: if its chat template puts fixed
    texts around messages, and knows neither tools nor the date."""
    source = GGUFFile.open(model).string("tokenizer.chat_template", "")
    if not source:
        return ""
    tokenizer = Tokenizer.open(model)
    changing = any(word in source for word in ("tools", "strftime"))
    turns = None if changing else turns_of(tokenizer)
    if turns is None:
        return _NO_TEMPLATE
    text = turns.in_go()
    literal = "".join([turns.lead, turns.prompt, *turns.before.values(), *turns.after.values()])
    if "{{" in literal or '"' in literal or not literal.replace("\n", "").isprintable():
        return _NO_TEMPLATE
    lines = f'TEMPLATE """{text}"""\n'
    end = turns.after["assistant"].strip()
    if end and not tokenizer.is_end(tokenizer.encode(end, bos=False, special=True)[0]):
        lines += f'PARAMETER stop "{end}"\n'
    return lines


# Texts that no template has, to find them again in what it renders.
_SYSTEM, _USER, _ANSWER, _NEXT = "Zq1", "Zq2", "Zq3", "Zq4"


def turns_of(tokenizer: Tokenizer) -> Turns | None:
    """The texts around messages, or None if the template does more than to put texts there."""
    talk: list[Message] = [
        {"role": "user", "content": _USER},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _NEXT},
    ]
    system: Message = {"role": "system", "content": _SYSTEM}
    try:
        with_prompt = _render(tokenizer, talk, prompt=True)
        prompt = _behind(with_prompt, _render(tokenizer, talk, prompt=False))
        start, between, again, end = _around(with_prompt, _USER, _ANSWER, _NEXT)
        after_user = _before(end, prompt)
        before_answer = _behind(between, after_user)
        after_answer = _around(_render(tokenizer, talk[:2], prompt=False), _ANSWER)[1]
        before_user = _behind(again, after_answer)
        before_system, first = _around(
            _render(tokenizer, [system, *talk], prompt=True).split(_ANSWER)[0], _SYSTEM, _USER
        )[:2]
        turns = Turns(
            lead=_before(start, before_user),
            before={"system": before_system, "user": before_user, "assistant": before_answer},
            after={
                "system": _before(first, before_user),
                "user": after_user,
                "assistant": after_answer,
            },
            prompt=prompt,
        )
        for messages in ([system, *talk], talk, talk[:1], [system, talk[0]], talk + talk[1:]):
            if turns.render(messages) != _render(tokenizer, messages, prompt=True):
                return None
    except (ModelError, ValueError):  # it refuses such a conversation, or moves texts about
        return None
    return turns


def _render(tokenizer: Tokenizer, messages: Sequence[Message], *, prompt: bool) -> str:
    """Without the BOS that Ollama puts in front itself."""
    text = tokenizer.chat.render(messages, prompt)
    if tokenizer.add_bos and tokenizer.bos is not None:
        return text.removeprefix(tokenizer.decode([tokenizer.bos], special=True))
    return text


def _around(text: str, *marks: str) -> list[str]:
    """The pieces of a text around marks, which must be there in this order, each once."""
    pieces = []
    for mark in marks:
        piece, text = text.split(mark)
        pieces.append(piece)
    return [*pieces, text]


def _behind(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ValueError(text)
    return text[len(start) :]


def _before(text: str, end: str) -> str:
    if not text.endswith(end):
        raise ValueError(text)
    return text[: len(text) - len(end)]
