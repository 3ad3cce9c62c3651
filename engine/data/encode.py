"""Examples to tokens, with the tokens that count in the loss marked.

A prompt is tokenized on its own and a completion as what follows it, so that training sees
the tokens that inference would: no token merges across the border. Names of special tokens in
prompts, completions and texts without a label are those tokens, as in a prompt to generate from;
in a text to be classified or embedded they are text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fwdllm.engine.data.batch import Tokens
from fwdllm.engine.data.jsonl import Example, check_labels
from fwdllm.engine.data.tokenizer import Tokenizer
from fwdllm.engine.data.turns import separate, turns
from fwdllm.engine.errors import DataError, TextError, TooLongError

# Most tokens in the cache of encoded examples, 12 MB: an int in a list takes 36 bytes, a bool 8.
_MOST_KEPT = 1 << 18


class Encoding:
    """Turns examples into the tokens that a model reads.

    context: the model's maximum number of tokens.  encoder: whether the model yields features, not
    next tokens.  labels: names of classes.  literal: names of special tokens are always text, and
    labels have no end, as before version 0.1. Encoded examples are cached while there is room,
    because a run needs them again in every epoch.
    """

    def __init__(
        self, tokenizer: Tokenizer, context: int, encoder: bool, labels: tuple[str, ...]
    ) -> None:
        self.tokenizer, self.context, self.encoder = tokenizer, context, encoder
        self.labels = labels
        self.literal = False
        self._end: tuple[tuple[str, ...], str] | None = None  # of labels
        # The key has the id() of an example, so the example must be kept alive, too.
        self._kept: dict[tuple[int, int | None, tuple[str, ...], bool], tuple[Example, Tokens]] = {}
        self._n_kept = 0

    def separate(self, examples: Iterable[Example]) -> list[Example]:
        """The examples, with conversations of several sequences as one for each; see ``turns``."""
        if self.encoder:
            return list(examples)
        chat = self.tokenizer.chat
        return [part for example in examples for part in separate(chat, example)]

    def example(self, example: Example, max_tokens: int | None) -> Tokens:
        """One example, cut to max_tokens. Errors: DataError."""
        key = (id(example), max_tokens, self.labels, self.literal)
        if (found := self._kept.get(key)) is not None:
            return found[1]
        try:
            tokens = self._example(example, max_tokens)
        except TextError as error:
            raise DataError(f"{example.where}: {error}") from error
        self._n_kept += len(tokens.ids)
        if self._n_kept > _MOST_KEPT:  # a server's examples are not needed again
            self._kept.clear()
            self._n_kept = len(tokens.ids)
        self._kept[key] = (example, tokens)
        return tokens

    def label(self, example: Example, label: str, end: str, max_tokens: int | None) -> Tokens:
        """An example's text with ``label`` and ``end`` as the tokens to predict.

        Errors: DataError.
        """
        return encode_label(self.tokenizer, example, label, end, self.context, max_tokens)

    def label_end(self, labels: tuple[str, ...]) -> str:
        """What ends a label of these: nothing, unless the tokens of one begin those of another.

        Otherwise the shorter one would always be the likelier.
        """
        if self.literal or self.encoder:
            return ""
        if self._end is None or self._end[0] != labels:
            ids = [self.tokenizer.encode(classification_prompt(x)[1], bos=False) for x in labels]
            nested = any(a is not b and b[: len(a)] == a for a in ids for b in ids)
            self._end = labels, LABEL_END if nested else ""
        return self._end[1]

    def _example(self, example: Example, max_tokens: int | None) -> Tokens:
        if not self.encoder and example.label is not None:
            return self.label(example, example.label, self.label_end(self.labels), max_tokens)
        if not self.encoder:
            return encode_decoder(self.tokenizer, example, self.context, max_tokens, self.literal)
        ids = encode_text(self.tokenizer, example, self.context, max_tokens)
        if example.label is None:
            return Tokens(ids, [False] * len(ids))
        check_labels([example], self.labels)
        return Tokens(ids, [False] * len(ids), self.labels.index(example.label))


# After a label, where the label alone could be the beginning of another one.
LABEL_END = "\n"


def classification_prompt(label: str) -> tuple[str, str]:
    """What a decoder reads after the text, and then the label as it is written there."""
    return "\nLabel:", f" {label}"


def encode_decoder(
    tokenizer: Tokenizer,
    example: Example,
    context: int,
    max_tokens: int | None,
    literal: bool = False,
) -> Tokens:
    """Tokens of one example without a label for a decoder, cut to max_tokens.

    literal: see ``Encoding``.
    DataError if no token is left to predict, or if max_tokens is None and the example is longer
    than the context.
    """
    if example.kind == "messages":
        tokens = _join(_chat_spans(tokenizer, example))
    elif example.kind == "completion":
        assert example.prompt is not None and example.completion is not None
        texts = [example.prompt, example.completion]
        spans = _encode_spans(tokenizer, texts, special=not literal)
        ended = not literal and bool(spans[1]) and tokenizer.is_end(spans[1][-1])
        if tokenizer.eos is not None and not ended:
            spans[1].append(tokenizer.eos)
        tokens = _join(zip(spans, [False, True], strict=True))
    else:
        assert example.text is not None
        tokens = _join([(_encode_spans(tokenizer, [example.text], special=not literal)[0], True)])
    if not any(tokens.labels[1:]):
        raise DataError(f"{example.where}: it has no token to predict")
    return _fit(tokens, tokenizer.bos, example, context, max_tokens)


def encode_label(
    tokenizer: Tokenizer,
    example: Example,
    label: str,
    end: str,
    context: int,
    max_tokens: int | None,
) -> Tokens:
    """Text, prompt, one candidate label and its end; the text is cut if they exceed max_tokens."""
    assert example.text is not None
    texts = [example.text, *classification_prompt(label), *([end] if end else [])]
    text, tail, *labels = _encode_spans(tokenizer, texts)
    predicted = [token for span in labels for token in span]
    limit = min(max_tokens or context, context)
    room = limit - len(tail) - len(predicted)
    if room < 1:
        raise DataError(
            f"{example.where}: {limit} tokens leave none for the text; the label and what stands "
            f"before it take {len(tail) + len(predicted)}"
        )
    if max_tokens is None and len(text) > room:
        raise _too_long(example, len(text) + len(tail) + len(predicted), context)
    return _join([(text[:room], False), (tail, False), (predicted, True)])


def encode_text(
    tokenizer: Tokenizer, example: Example, context: int, max_tokens: int | None
) -> list[int]:
    """Tokens of a text for an encoder, with the encoder's special tokens around them."""
    if example.text is None:
        raise DataError(f"{example.where}: an encoder reads examples with a text")
    ids = tokenizer.encode(example.text, bos=True)
    limit = min(max_tokens or context, context)
    if len(ids) > limit:
        if max_tokens is None:
            raise _too_long(example, len(ids), context)
        ids = [*ids[: limit - 1], ids[-1]]  # the closing special token stays
    return ids


def _chat_spans(tokenizer: Tokenizer, example: Example) -> list[tuple[list[int], bool]]:
    """(ids, labelled) of spans of the rendered conversation; what is learned is labelled."""
    texts: list[str] = []
    done = 0
    for turn in turns(tokenizer.chat, example):
        texts += [turn.before[done:], turn.answer]
        done = len(turn.before) + len(turn.answer)
    ids = _encode_spans(tokenizer, texts, special=True)
    return [(span, i % 2 == 1) for i, span in enumerate(ids)]


def _encode_spans(
    tokenizer: Tokenizer, texts: Sequence[str], special: bool = False
) -> list[list[int]]:
    """Tokens of consecutive texts, BOS first if the model wants it.

    Each text is tokenized together with those before it, because SentencePiece would put a space
    in front of a text alone. Where that changes earlier tokens (a token would cross the border
    between two texts), the text is tokenized alone.
    """
    before, before_ids = "", list[int]()
    spans = []
    for text in texts:
        joint = tokenizer.encode(before + text, bos=False, special=special)
        if joint[: len(before_ids)] == before_ids:
            spans.append(joint[len(before_ids) :])
        else:
            spans.append(tokenizer.encode(text, bos=False, special=special))
        before, before_ids = before + text, before_ids + spans[-1]
    spans[0] = tokenizer.with_bos(spans[0])
    return spans


def _join(spans: Iterable[tuple[list[int], bool]]) -> Tokens:
    spans = list(spans)
    return Tokens(
        ids=[token for ids, _ in spans for token in ids],
        labels=[labelled for ids, labelled in spans for _ in ids],
    )


def _fit(
    tokens: Tokens, bos: int | None, example: Example, context: int, max_tokens: int | None
) -> Tokens:
    """Cut to the limit. A long prompt loses its beginning, so that half of the limit is left for
    the tokens to predict; not its BOS, without which some models predict next to nothing."""
    n = len(tokens.ids)
    if max_tokens is None and n > context:
        raise _too_long(example, n, context)
    limit = min(max_tokens or context, context)
    first = tokens.labels.index(True)
    predicted = min(n - first, limit - limit // 2)
    start = max(0, first + predicted - limit)
    ids, labels = tokens.ids[start : start + limit], tokens.labels[start : start + limit]
    if 0 < start < first and tokens.ids[0] == bos:
        ids[0] = tokens.ids[0]
    return Tokens(ids, labels)


def _too_long(example: Example, n_tokens: int, context: int) -> DataError:
    return TooLongError(example.where, n_tokens, context)
