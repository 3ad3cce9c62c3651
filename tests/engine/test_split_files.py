"""Models in several files: read as one, or the file that is wrong is named."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from gguf_bytes import STRING, U32, gguf, pair, tensor, text

from fwdllm.engine import Engine, LoRAConfig
from fwdllm.engine.data.jsonl import Example
from fwdllm.engine.errors import ModelError
from fwdllm.engine.files import fingerprint
from fwdllm.engine.gguf.file import GGUFFile
from fwdllm.inference import generate
from fwdllm.inspect import inspect_model

FIRST, SECOND = "split-00001-of-00002.gguf", "split-00002-of-00002.gguf"
TEXT = Example(text="The market opened higher on Monday, and shares of energy firms rose.")


@pytest.fixture
def whole(shared: Path) -> Path:
    return shared / "models/tinymix-6m.Q4_0.gguf"


@pytest.fixture(scope="module")
def models(make_models: ModuleType, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same model in two files."""
    folder = tmp_path_factory.mktemp("split")
    make_models.shards(folder, shared / "models/tinymix-6m.Q4_0.gguf", "split", 2)
    return folder


def test_all_files_are_one_model(models: Path, whole: Path) -> None:
    split, joined = GGUFFile.open(models / FIRST), GGUFFile.open(whole)
    assert [path.name for path in split.paths] == [FIRST, SECOND]
    assert set(split.tensors) == set(joined.tensors)
    assert split.nbytes == sum(path.stat().st_size for path in split.paths)
    for name, info in joined.tensors.items():
        if len(info.shape) == 1:
            np.testing.assert_array_equal(split.vector(name), joined.vector(name))
        else:
            np.testing.assert_array_equal(split.weight(name).data, joined.weight(name).data)
    keys = ("n_parameters", "shapes", "tensor_types", "targets", "step_memory", "backend")
    assert [inspect_model(split.path)[key] for key in keys] == [
        inspect_model(whole)[key] for key in keys
    ]


@pytest.mark.parametrize("backend", ["fwdllm", "llama.cpp"])
def test_losses_are_those_of_the_whole(models: Path, whole: Path, backend: str) -> None:
    split, joined = (
        Engine.load(path, backend=backend).evaluate([TEXT]).loss for path in (models / FIRST, whole)
    )
    assert split == joined


def test_a_budget_drops_pages_of_all_files(models: Path, whole: Path) -> None:
    """Layers of either file are read again after they were dropped, with the same bits."""
    found = []
    for path in (models / FIRST, whole):
        engine = Engine.load(path, LoRAConfig(rank=2), memory_budget=1 << 30)
        residency = engine.graph.residency  # type: ignore[attr-defined]
        # What a smaller budget would do, but that depends on the process's other memory.
        limit, residency.limit = residency.limit, lambda _: None
        limit(residency.largest)
        assert len(residency._dropped) == engine.args.n_layers + 1
        for layer, part in ((0, 0), (engine.args.n_layers - 1, -1)):
            assert {m for m, *_ in residency._ranges(layer)} == {engine.file.mappings[part]}
        found.append(engine.gradient(engine.encode([TEXT])).values)
    np.testing.assert_array_equal(*found)


@pytest.mark.usefixtures("one_thread")
def test_a_split_model_continues_a_text(models: Path, whole: Path) -> None:
    split, joined = ("".join(generate(p, "Hello", max_tokens=4)) for p in (models / FIRST, whole))
    assert split == joined != ""


def test_the_fingerprint_is_of_all_files(models: Path, whole: Path, tmp_path: Path) -> None:
    paths = [Path(shutil.copy(models / name, tmp_path)) for name in (FIRST, SECOND)]
    before = fingerprint(*GGUFFile.open(paths[0]).paths)
    with open(paths[1], "rb+") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    after = fingerprint(*GGUFFile.open(paths[0]).paths)
    assert before["bytes"] == after["bytes"] == sum(path.stat().st_size for path in paths)
    assert before["sha256_of_ends"] != after["sha256_of_ends"]


def test_the_fingerprint_of_one_file_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"abc")
    # SHA-256 of "abc", and of its end, "abc" again: what ledgers and runs have recorded.
    assert fingerprint(path) == {
        "bytes": 3,
        "sha256_of_ends": "bbb59da3af939f7af5f360f2ceb80a496e3bae1cd87dde426db0ae40677e1c2c",
    }


def part(
    number: int, count: int, *names: str, total: int = 2, more: tuple[bytes, ...] = ()
) -> bytes:
    """A file of a split model with some tensors of one number."""
    pairs = {"split.no": number, "split.count": count, "split.tensors.count": total}
    return gguf(
        (*more, *(pair(key, U32, struct.pack("<I", value)) for key, value in pairs.items())),
        tuple(tensor(name, (1,), offset=32 * i) for i, name in enumerate(names)),
        data=bytes(32 * len(names)),
    )


def architecture(name: str) -> tuple[bytes, ...]:
    return (pair("general.architecture", STRING, text(name)),)


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., GGUFFile]:
    """Writes files by number, from 1, and opens one of them."""

    def open_file(*files: bytes | None, number: int = 1, count: int = 0) -> GGUFFile:
        paths = [
            tmp_path / f"m-{i:05}-of-{count or len(files):05}.gguf"
            for i in range(1, len(files) + 1)
        ]
        for path, content in zip(paths, files, strict=True):
            if content is not None:
                path.write_bytes(content)
        return GGUFFile.open(paths[number - 1])

    return open_file


def test_three_files(opened: Callable[..., GGUFFile]) -> None:
    llama = architecture("llama")
    file = opened(
        part(0, 3, "a", total=4, more=llama),
        part(1, 3, "b", "c", total=4),
        part(2, 3, "d", total=4, more=llama),
    )
    assert {name: info.part for name, info in file.tensors.items()} == {
        "a": 0,
        "b": 1,
        "c": 1,
        "d": 2,
    }
    assert file.string("general.architecture") == "llama"


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ((part(0, 2, "a"), None), r"m-00001.* is file 1 .*, but m-00002-of-00002.gguf is not besi"),
        ((part(0, 2, "a"), part(0, 2, "b")), r"00002.gguf is not file 2 .* calls it file 1 of 2"),
        ((part(0, 2, "a"), part(1, 3, "b")), r"00002.gguf is not file 2 .* calls it file 2 of 3"),
        ((part(0, 2, "a"), gguf()), r"00002.gguf is not file 2 of the 2 of .*: its metadata"),
        ((part(0, 2, "a"), part(1, 2, "a")), r"00002.gguf and .*00001.* both have the tensor 'a'"),
        ((part(0, 2, "a"), part(1, 2)), r"have 1 tensors together, but the model has 2"),
        ((part(0, 2, "a"), part(1, 2, "b", total=3)), r"00002.*another model.*split.tensors.count"),
        (
            (part(0, 2, "a", more=architecture("x")), part(1, 2, "b", more=architecture("y"))),
            r"00002.gguf is of another model than .*: its general.architecture differs",
        ),
        ((part(0, 2, "a"), b"GGUF"), r"00002.gguf is truncated"),
        ((part(0, 2, "a"), b""), r"00002.gguf is empty"),
        ((part(0, 2, "a"), part(1, 2**31, "b")), "00002.gguf is damaged.*'split.count'"),
        ((part(0, 3, "a"), part(1, 3, "b")), "file 1 of the 3 .* must end in -00001-of-00003.gguf"),
    ],
)
def test_a_file_that_does_not_belong_is_named(
    opened: Callable[..., GGUFFile], files: tuple[bytes | None, ...], what: str
) -> None:
    with pytest.raises(ModelError, match=what):
        opened(*files)


def test_another_file_than_the_first_names_the_first(opened: Callable[..., GGUFFile]) -> None:
    with pytest.raises(ModelError, match=r"file 2 of the 2 .*: name the first, .*m-00001-of-00002"):
        opened(part(0, 2, "a"), part(1, 2, "b"), number=2)


def test_a_file_that_was_mended_is_read_again(opened: Callable[..., GGUFFile]) -> None:
    first = part(0, 2, "a")
    with pytest.raises(ModelError, match="both have"):
        opened(first, part(1, 2, "a"))
    assert set(opened(first, part(1, 2, "b")).tensors) == {"a", "b"}
    assert set(opened(first, part(1, 2, "cc")).tensors) == {"a", "cc"}


def test_a_file_may_be_named_as_one_of_many(opened: Callable[..., GGUFFile]) -> None:
    assert opened(gguf(tensors=(tensor("t", (1,)),), data=bytes(4)), count=7).paths
