"""Labels of texts: the probabilities that evaluation counts, in any company, of any backend."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from llama_models import ENCODER, LABELS, tuned

from fwdllm.engine.adapters import head
from fwdllm.engine.adapters.adapter import Adapter
from fwdllm.engine.adapters.io import save_gguf
from fwdllm.engine.classification import Classification
from fwdllm.engine.data.jsonl import Example
from fwdllm.engine.engine import Engine
from fwdllm.engine.errors import ConfigError, DataError, NumericsError, TooLongError
from fwdllm.engine.llamacpp.native import Llama, llama_cpp
from fwdllm.engine.settings import LoRAConfig

TEXTS = ["a wonderful film", "dull and far too long", "I loved it", "a waste of an evening", "hm"]
TRUTH = ["positive", "negative", "positive", "negative", "negative"]
LABELLED = [Example(text=t, label=label) for t, label in zip(TEXTS, TRUTH, strict=True)]


def test_scores_of_a_text_do_not_depend_on_its_company() -> None:
    """To the last bit; a matmul of BLAS takes another kernel for another number of rows."""
    rng = np.random.default_rng(0)
    for n in range(2, 12):
        features = rng.normal(size=(n, 384)).astype(np.float32)
        weight = rng.normal(size=(3, 384)).astype(np.float32)
        together = head._products(features, weight)
        np.testing.assert_allclose(together, features.astype(np.float64) @ weight.T, rtol=1e-9)
        for i in range(n):
            np.testing.assert_array_equal(
                head._products(features[i : i + 1], weight)[0], together[i]
            )


def texts(*found: str) -> list[Example]:
    return [Example(text=text, line=line) for line, text in enumerate(found, 1)]


def moved(engine: Engine) -> Engine:
    """The engine with an adapter, and a head, that do something."""
    assert engine.adapter is not None
    theta = engine.adapter.theta
    theta += np.random.default_rng(1).normal(0, 0.05, theta.size).astype(np.float32)
    return engine


@pytest.fixture(scope="module")
def minilm(shared: Path) -> Engine:
    path = shared / "models" / "minilm-l6-v2.Q4_0.gguf"
    return moved(Engine.load(path, LoRAConfig(2), labels=("so so", *LABELS)))


@pytest.fixture(scope="module")
def modern(small: Callable[..., Path]) -> Engine:
    """An encoder that llama.cpp computes."""
    return moved(tuned(small(ENCODER), ENCODER))


@pytest.fixture(scope="module")
def decoder(bundled: Path) -> Engine:
    return moved(Engine.load(bundled, LoRAConfig(2)))


def of(found: Classification, label: str) -> float:
    return found.probabilities[found.labels.index(label)]


@pytest.mark.parametrize("name", ["minilm", "modern"])
@pytest.mark.parametrize("max_tokens", [None, 4])
def test_an_encoders_probabilities_are_those_of_evaluation(
    request: pytest.FixtureRequest, name: str, max_tokens: int | None
) -> None:
    engine: Engine = request.getfixturevalue(name)
    found = list(engine.classify(texts(*TEXTS), max_tokens=max_tokens))
    result = engine.evaluate(LABELLED, max_tokens)
    losses = [-np.log(of(one, label)) for one, label in zip(found, TRUTH, strict=True)]
    assert np.mean(losses) == pytest.approx(result.loss, rel=1e-12)
    right = [one.label == label for one, label in zip(found, TRUTH, strict=True)]
    assert np.mean(right) == result.accuracy
    assert len({one.probability for one in found}) == len(found)
    for one in found:
        assert set(one.labels) == set(engine.labels)
        assert sum(one.probabilities) == pytest.approx(1)
        assert list(one.probabilities) == sorted(one.probabilities, reverse=True)
        assert (one.label, one.probability) == (one.labels[0], one.probabilities[0])
        exps = np.exp(one.scores)
        np.testing.assert_allclose(exps / exps.sum(), one.probabilities)


@pytest.mark.usefixtures("one_thread")
def test_features_are_those_of_llama_cpp_itself(minilm: Engine, tmp_path: Path) -> None:
    """llama-cpp-python's embeddings with the LoRA file, and the head's product by hand."""
    adapter = minilm.adapter
    assert adapter is not None
    save_gguf(adapter, tmp_path / "a.gguf")
    llama = Llama(
        str(minilm.file.path),
        lora_path=str(tmp_path / "a.gguf"),
        embedding=True,
        pooling_type=llama_cpp.LLAMA_POOLING_TYPE_MEAN,
        n_threads=1,
        verbose=False,
    )
    plain = np.array([softmax(adapter, llama.embed(text, normalize=False)) for text in TEXTS])
    llama.close()
    labels = minilm.labels
    path = minilm.file.path
    other = Engine.load(path, adapter=tmp_path / "a.gguf", backend="llama.cpp")
    # Both round activations to int8, but not in the same places.
    for engine, noise in ((minilm, 0.02), (other, 0.02)):
        found = [[of(one, x) for x in labels] for one in engine.classify(texts(*TEXTS))]
        np.testing.assert_allclose(found, plain, atol=noise)
    assert np.ptp(plain, axis=0).max() > 0.1


def softmax(adapter: Adapter, features: list[float]) -> np.ndarray:
    assert adapter.head is not None
    weight, bias = np.split(adapter.theta[adapter.n_lora :], [adapter.head.n_weight])
    exps = np.exp(weight.reshape(-1, adapter.head.n_in) @ np.array(features) + bias)
    found: np.ndarray = exps / exps.sum()
    return found


def test_a_decoder_chooses_by_what_it_gives_the_labels(decoder: Engine) -> None:
    found = list(decoder.classify(texts(*TEXTS), LABELS))
    right = [one.label == label for one, label in zip(found, TRUTH, strict=True)]
    assert np.mean(right) == decoder.evaluate(LABELLED).accuracy
    for text, one in zip(TEXTS, found, strict=True):
        for label, score in zip(one.labels, one.scores, strict=True):
            batch = decoder.encode([Example(text=text, label=label)])
            assert score == pytest.approx(-decoder.loss(batch)[0] * batch.n_labels)
        exps = np.exp(one.scores)
        np.testing.assert_allclose(exps / exps.sum(), one.probabilities)


def test_labels_that_begin_alike_are_scored_as_in_evaluation(decoder: Engine) -> None:
    """With their end, without which the shorter would always be the likelier."""
    labels = ("1", "10")
    found = list(decoder.classify(texts(*TEXTS), labels))
    truth = [labels[i % 2] for i in range(len(TEXTS))]
    examples = [Example(text=t, label=x) for t, x in zip(TEXTS, truth, strict=True)]
    result = decoder.evaluate(examples)
    scores = [one.scores[one.labels.index(x)] for one, x in zip(found, truth, strict=True)]
    assert -sum(scores) == pytest.approx(result.loss * result.n_tokens)
    right = [one.label == x for one, x in zip(found, truth, strict=True)]
    assert np.mean(right) == result.accuracy


@pytest.mark.parametrize("name", ["minilm", "decoder"])
def test_a_text_has_the_same_bits_in_any_company(request: pytest.FixtureRequest, name: str) -> None:
    engine: Engine = request.getfixturevalue(name)
    labels = () if name == "minilm" else LABELS
    alone = [next(engine.classify(texts(text), labels)) for text in TEXTS]
    assert list(engine.classify(texts(*TEXTS * 14), labels)) == alone * 14


def test_texts_may_be_without_end(minilm: Engine) -> None:
    taken = 0

    def endless() -> Iterator[Example]:
        nonlocal taken
        while True:
            taken += 1
            yield Example(text=TEXTS[taken % 5])

    assert len(list(islice(minilm.classify(endless()), 70))) == 70
    assert taken <= 128
    assert list(minilm.classify([])) == []


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("", "line 3: there is no text"),
        ("half \ud800", "line 3: the text cannot be written as UTF-8"),
        ("word " * 600, "line 3: the example has 602 tokens, but the model's context is 512"),
    ],
)
def test_a_bad_text_is_named_after_the_results_of_those_before(
    minilm: Engine, bad: str, said: str
) -> None:
    found = minilm.classify(texts("good", "fine", bad, "last"))
    assert [next(found), next(found)] == list(minilm.classify(texts("good", "fine")))
    with pytest.raises(DataError, match=said):
        next(found)


def test_a_long_text_is_cut_as_in_evaluation(minilm: Engine) -> None:
    long = "word " * 600
    with pytest.raises(TooLongError) as error:
        list(minilm.classify(texts(long)))
    assert (error.value.n_tokens, error.value.context) == (602, 512)
    [cut] = minilm.classify(texts(long), max_tokens=512)
    result = minilm.evaluate([Example(text=long, label="positive")], 512)
    assert of(cut, "positive") == pytest.approx(np.exp(-result.loss))


def test_labels_that_make_no_sense_are_refused_at_once(
    minilm: Engine, decoder: Engine, shared: Path
) -> None:
    with pytest.raises(ConfigError, match=r"its own labels \(so so, negative, positive\)"):
        minilm.classify([], ["a", "b"])
    with pytest.raises(ConfigError, match="needs an adapter with a head"):
        Engine.load(minilm.file.path).classify([])
    with pytest.raises(ConfigError, match="no labels of its own"):
        decoder.classify([])
    for labels in (["a"], ["a", "a"], ["a", ""]):
        with pytest.raises(ConfigError, match="two or more labels"):
            decoder.classify([], labels)


def test_a_score_that_is_not_finite_is_an_error(minilm: Engine, tmp_path: Path) -> None:
    assert minilm.adapter is not None
    save_gguf(minilm.adapter, tmp_path / "a.gguf")
    engine = Engine.load(minilm.file.path, adapter=tmp_path / "a.gguf")
    assert engine.adapter is not None
    engine.adapter.theta[-1] = np.inf
    with pytest.raises(NumericsError, match="not finite"):
        list(engine.classify(texts("x")))


def test_it_is_what_python_users_call(minilm: Engine, tmp_path: Path) -> None:
    import fwdllm

    assert minilm.adapter is not None
    save_gguf(minilm.adapter, tmp_path / "a.gguf")
    found = list(fwdllm.classify(minilm.file.path, TEXTS, adapter=tmp_path / "a.gguf"))
    assert found == list(minilm.classify(texts(*TEXTS)))
    with pytest.raises(DataError, match="line 2: there is no text"):
        list(fwdllm.classify(minilm.file.path, ["a", ""], adapter=tmp_path / "a.gguf"))
    assert json.dumps(found[0].probabilities)
