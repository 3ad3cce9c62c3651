"""Ways in which a model's file can be wrong: each changes the parts of a sound one."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

from gguf_bytes import ARRAY, BOOL, F32, STRING, U8, U32, array, text
from gguf_parts import SIZES, Entry, Pair, Parts, of_strings, read_parts, strings

F64, I32, I64, U64 = 12, 5, 11, 10
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q"}
_FORMATS[F64] = "d"

NUMBERS = [0, 1, 2, 3, 5, 7, 8, 16, 31, 32, 33, 63, 64, 65, 100, 127, 128, 255, 256, 257, 511, 512,
    513, 1024, 4096, 32767, 65535, 65536, 10**6, 2**30, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**60,
    2**63 - 1, 2**63, 2**64 - 1, -1, -2, -128]  # fmt: skip
FLOATS = [0.0, -0.0, 1.0, -1.0, 1e-5, -1e-5, 1e-30, 1e-45, 1e30, 3e38, -3e38, 0.5, 2.0, 1e5]
FLOATS += [math.nan, math.inf, -math.inf]
TEXTS = [b"", b" ", b"x", b"x" * 70_000, b"\0", b"a\0b", b"\xff\xfe", b"[red]bold[/red]", b"[/]",
    b"\x1b[31mred", b"%s%n", b"../../etc/passwd", b"none", b"linear", b"yarn", b"longrope",
    "ß語😀".encode(), b"true", b"0", b"\n\n"]  # fmt: skip
ARCHITECTURES = ["llama", "llama4", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma", "gemma2",
    "gemma3", "gemma3n", "phi2", "phi3", "gpt2", "gptneox", "bert", "nomic-bert", "modern-bert",
    "jina-bert-v2", "t5", "t5encoder", "mamba", "mamba2", "rwkv6", "rwkv7", "falcon", "bloom",
    "mpt", "starcoder", "stablelm", "command-r", "deepseek", "deepseek2", "granite", "jamba",
    "olmo", "openelm", "bitnet", "plamo2", "clip", "wavtokenizer-dec", "dream", "gpt-oss", "lfm2",
    "minicpm", "mistral3", "unknown", "", "LLAMA"]  # fmt: skip
SPLITTERS = ["default", "llama3", "llama-bpe", "deepseek-llm", "deepseek-coder", "deepseek-v3",
    "falcon", "mpt", "starcoder", "gpt-2", "jina-es", "refact", "command-r", "qwen2", "stablelm2",
    "olmo", "dbrx", "smaug-bpe", "poro-chat", "chatglm-bpe", "viking", "jais", "tekken", "smollm",
    "codeshell", "bloom", "gpt3-finnish", "exaone", "chameleon", "minerva-7b", "megrez", "gpt-4o",
    "superbpe", "trillion", "bailingmoe", "llama4", "pixtral", "seed-coder", "a.x-4.0", "hunyuan",
    "kimi-k2", "grok-2", "nope", ""]  # fmt: skip
TOKENIZERS = [
    "llama",
    "gpt2",
    "bert",
    "t5",
    "rwkv",
    "plamo2",
    "none",
    "no_vocab",
    "replit",
    "",
    "x",
]
TEMPLATES = [
    "{{", "{% for %}", "{{ messages[0].content }}", "{{ 1/0 }}", "{{ messages[99].x.y }}",
    "{% for i in range(10**9) %}{{ i }}{% endfor %}", "{{ 'x' * 10**10 }}", "{{ 10**10**10 }}",
    "{% for m in messages %}{{ m.content * 10**9 }}{% endfor %}", "{{ raise_exception('no') }}",
    "{{ ''.__class__.__mro__ }}", "{{ messages | tojson(indent=10**9) }}", "{{ [1]*10**9 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ strftime_now('%' * 99) }}",
    "{{ range(10**9) | list | length }}", "{{ '%999999999d' % 1 }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ messages | map('upper') | join }}", "{{ 'a' | center(10**9) }}", "{% include 'x' %}",
    "{{ cycler(1).next.__globals__ }}", "{{ namespace() }}", "{{ lipsum(n=10**6) }}", "" , " ",
    "{{ tools.x }}", "{{ undefined_function() }}", "{{ bos_token + 1 }}", "{" * 10_000,
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% if 1 %}" * 2000, "\udcff{{ x }}",
    "{{ messages[0]['content'] | wordwrap(1) }}", "{{ 'a' ~ 'b' }}" * 20_000,
    "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{%- endfor %}",
]  # fmt: skip
# Keys that models may have, without the architecture; most of the sound files lack most of them.
OPTIONAL = ["expert_count", "expert_used_count", "expert_shared_count", "expert_weights_scale",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.attn_factor", "rope.freq_base", "rope.dimension_count", "rope.scale_linear",
    "attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa",
    "hidden_activation", "attention.key_length", "attention.value_length",
    "attention.causal", "pooling_type", "logit_scale", "attn_logit_softcapping", "block_count",
    "final_logit_softcapping", "embedding_scale", "residual_scale", "attention.scale",
    "attention.clamp_kqv", "attention.max_alibi_bias", "use_parallel_residual", "vocab_size",
    "tensor_data_layout", "leading_dense_block_count", "decoder_block_count", "ssm.state_size",
    "ssm.inner_size", "ssm.conv_kernel", "ssm.time_step_rank", "nextn_predict_layers",
    "attention.head_count_kv", "feed_forward_length", "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon", "attention.group_norm_groups", "features_length",
    "classifier.output_labels", "attention.q_lora_rank", "swin_norm", "rescale_every_n_layers",
    "attention.shared_kv_layers", "rope.dimension_sections", "dense_2_feat_out"]  # fmt: skip
GENERAL = ["general.alignment", "general.type", "general.file_type", "general.name",
    "general.quantization_version", "split.count", "split.no", "split.tensors.count",
    "adapter.type", "adapter.lora.alpha", "general.size_label"]  # fmt: skip
SPECIAL = ["bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id", "unknown_token_id",
    "seperator_token_id", "padding_token_id", "cls_token_id", "mask_token_id",
    "fim_pre_token_id", "token_type_count"]  # fmt: skip
FLAGS = ["add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces",
    "add_sep_token"]  # fmt: skip

Change = Callable[[Parts, Random], None]


def packed(type: int, number: float) -> bytes:
    """A number as one of this type, cut to what it can hold."""
    if type in (F32, F64):
        return struct.pack("<" + _FORMATS[type], float(number) if abs(number) < 1e38 else number)
    size = SIZES[type]
    return (int(number) % 2 ** (8 * size)).to_bytes(size, "little")


def any_value(random: Random) -> tuple[int, bytes]:
    """A value of any type."""
    type = random.choice([*SIZES, STRING, ARRAY])
    if type == STRING:
        return type, text(random.choice(TEXTS))
    if type == ARRAY:
        item = random.choice([U8, U32, I32, F32, BOOL, STRING])
        count = random.choice([0, 1, 2, 3, 64, 512])
        if item == STRING:
            return type, of_strings([random.choice(TEXTS[:3]) for _ in range(count)])
        return type, array(item, count, b"".join(_of_type(item, random) for _ in range(count)))
    return type, _of_type(type, random)


def _of_type(type: int, random: Random) -> bytes:
    return packed(type, random.choice(FLOATS if type in (F32, F64) else NUMBERS))


def _scalar(p: Pair) -> float:
    found: float = struct.unpack("<" + _FORMATS[p.type], p.value)[0]
    return found


def _any_pair(parts: Parts, random: Random) -> Pair:
    """A pair, more often one of the architecture's than one of the tokenizer's."""
    own = [p for p in parts.pairs if p.key.startswith(parts.architecture.encode() + b".")]
    return random.choice(own if own and random.random() < 0.6 else parts.pairs)


def metadata_value(parts: Parts, random: Random) -> None:
    """Another value of the same type."""
    p = _any_pair(parts, random)
    if p.type == STRING:
        p.value = text(random.choice(TEXTS))
    elif p.type == ARRAY:
        item, count = struct.unpack_from("<IQ", p.value)
        if item == STRING:
            found = strings(p.value)
            p.value = of_strings(random.choice([found[:-1], found[:1], [], found + found[-1:]]))
        else:
            body, size = p.value[12:], SIZES[item]
            shorter = array(item, count - 1, body[: -size or None]) if count else p.value
            random_ones = b"".join(_of_type(item, random) for _ in range(count))
            p.value = random.choice([shorter, array(item, 0, b""), array(item, count, random_ones)])
    elif p.type in (F32, F64):
        p.value = _of_type(p.type, random)
    else:
        now = _scalar(p)
        near = [now - 1, now + 1, now * 2, now // 2, now * 3, -now]
        p.value = packed(p.type, random.choice(near if random.random() < 0.5 else NUMBERS))


def metadata_type(parts: Parts, random: Random) -> None:
    """A value of another type; where both are numbers, often the same one."""
    p = _any_pair(parts, random)
    if p.type in SIZES and random.random() < 0.5:
        now, type = _scalar(p), random.choice(list(SIZES))
        now = now if math.isfinite(now) else 0.0
        if random.random() < 0.3:
            n = random.choice([1, 2, 6, 512])
            p.type, p.value = ARRAY, array(type, n, packed(type, now) * n)
        else:
            p.type, p.value = type, packed(type, now)
    else:
        p.type, p.value = any_value(random)


def metadata_missing(parts: Parts, random: Random) -> None:
    parts.pairs.remove(_any_pair(parts, random))


def metadata_doubled(parts: Parts, random: Random) -> None:
    p = _any_pair(parts, random)
    copy = Pair(p.key, p.type, p.value)
    if random.random() < 0.5:
        copy.type, copy.value = any_value(random)
    parts.pairs.insert(random.randrange(len(parts.pairs) + 1), copy)


def metadata_swapped(parts: Parts, random: Random) -> None:
    one, other = _any_pair(parts, random), _any_pair(parts, random)
    one.type, one.value, other.type, other.value = other.type, other.value, one.type, one.value


def metadata_added(parts: Parts, random: Random) -> None:
    """A key that the architecture knows, or a general one, with some value."""
    key = random.choice(GENERAL)
    if random.random() < 0.75:
        key = f"{parts.architecture}.{random.choice(OPTIONAL)}"
    type = random.choice([U32, U32, F32, BOOL, STRING])
    value = text(random.choice(TEXTS)) if type == STRING else _of_type(type, random)
    parts.put(key.encode(), *((type, value) if random.random() < 0.8 else any_value(random)))


def architecture(parts: Parts, random: Random) -> None:
    """Another architecture, whose keys mostly come along."""
    old, new = parts.architecture.encode(), random.choice(ARCHITECTURES).encode()
    parts.put(b"general.architecture", STRING, text(new))
    if random.random() < 0.8:
        for p in parts.pairs:
            if p.key.startswith(old + b"."):
                p.key = new + p.key[len(old) :]


def tensor_name(parts: Parts, random: Random) -> None:
    one, other = random.choice(parts.tensors), random.choice(parts.tensors)
    name = one.name
    random.choice(
        [
            lambda: one.__dict__.update(name=other.name, dims=one.dims),
            lambda: (one.__dict__.update(name=other.name), other.__dict__.update(name=name)),
            lambda: one.__dict__.update(name=random.choice(TEXTS)),
            lambda: one.__dict__.update(name=name.replace(b"weight", b"bias")),
            lambda: one.__dict__.update(name=name + b"x" * random.choice([1, 50, 60, 200])),
            lambda: one.__dict__.update(name=name.replace(b"blk.0", b"blk.99")),
        ]
    )()


def tensor_missing(parts: Parts, random: Random) -> None:
    for _ in range(random.choice([1, 1, 1, 3])):
        if parts.tensors:
            parts.tensors.remove(random.choice(parts.tensors))


def tensor_doubled(parts: Parts, random: Random) -> None:
    t = random.choice(parts.tensors)
    name = random.choice([t.name, t.name.replace(b"blk.0", b"blk.7"), b"extra.weight"])
    parts.tensors.append(Entry(name, t.dims, t.type, t.offset))


def tensor_shape(parts: Parts, random: Random) -> None:
    t = random.choice(parts.tensors)
    dims = list(t.dims)
    at = random.randrange(len(dims)) if dims else 0
    choice = random.randrange(7)
    if choice == 0 or not dims:
        dims = dims[::-1]
    elif choice == 1:
        dims[at] = random.choice(NUMBERS) % 2**64
    elif choice == 2:
        dims[at] = max(dims[at] + random.choice([-32, -1, 1, 32]), 0)
    elif choice == 3:
        dims[at] *= random.choice([2, 3, 2**20])
    elif choice == 4:
        dims.append(random.choice([0, 1, 2, 4]))
    elif choice == 5:
        dims.pop()
    else:
        dims[at] //= 2
    t.dims = tuple(d % 2**64 for d in dims)


def tensor_type(parts: Parts, random: Random) -> None:
    for t in random.choices(parts.tensors, k=random.choice([1, 1, 2, 5])):
        t.type = random.choice([*range(42), 99, 2**31, 2**32 - 1])


def tensor_offset(parts: Parts, random: Random) -> None:
    one, other = random.choice(parts.tensors), random.choice(parts.tensors)
    near = one.offset + random.choice([-32, -1, 1, 4, 32])
    one.offset = random.choice([other.offset, near % 2**64, 0, *(n % 2**64 for n in NUMBERS)])


def tensor_data(parts: Parts, random: Random) -> None:
    """Numbers that are none, infinite or nothing, in one tensor or in all."""
    size = len(parts.data)
    start, end = 0, size
    if random.random() < 0.8:
        t = random.choice(parts.tensors)
        start = t.offset
        end = min((o.offset for o in parts.tensors if o.offset > start), default=size)
    if end - start < 64:
        start, end = 0, size
    choice = random.randrange(5)
    if choice == 0:
        parts.data[start:end] = bytes(end - start)
    elif choice == 1:
        parts.data[start:end] = b"\xff" * (end - start)
    elif choice == 2:
        parts.data[start:end] = random.randbytes(end - start)
    else:
        number = random.choice([b"\x00\x7e", b"\x00\x7c", b"\x00\xfc", b"\x00\x00\xc0\x7f",
                                b"\x00\x00\x80\x7f", b"\xff\x7b", b"\xff\xff\x7f\x7f"])  # fmt: skip
        step = random.choice([0, 2, 18, 20, 34, 64])
        places = [random.randrange(start, end - 4) for _ in range(random.choice([1, 10]))]
        for at in range(start, end - 4, step) if step else places:
            parts.data[at : at + len(number)] = number


def vocabulary(parts: Parts, random: Random) -> None:
    random.choice([_tokens, _token_numbers, _merges, _special, _kind, _kind, _splitter])(
        parts, random
    )


def _tokens(parts: Parts, random: Random) -> None:
    p = parts.find(b"tokenizer.ggml.tokens")
    if p is None:
        return
    found, n = strings(p.value), random.choice([1, 1, 5, 100])
    ways = [
        lambda i: found.__setitem__(i, random.choice(found)),
        lambda i: found.__setitem__(i, random.choice(TEXTS)),
        lambda i: found.__delitem__(i),
        lambda i: found.insert(i, b"added %d" % i),
        lambda i: found.__setitem__(i, random.randbytes(3)),
        lambda i: found.__setitem__(i, b"<0x%02X>" % (i % 256)),
    ]
    way = random.choice(ways)
    for _ in range(n):
        way(random.randrange(len(found)))
    if random.random() < 0.15:
        found = [t for t in found if not t.startswith(b"<0x")]
    p.value = of_strings(found)


def _token_numbers(parts: Parts, random: Random) -> None:
    key = random.choice([b"tokenizer.ggml.token_type", b"tokenizer.ggml.scores"])
    p = parts.find(key)
    if p is None or p.type != ARRAY:
        return
    item, count = struct.unpack_from("<IQ", p.value)
    body, size = bytearray(p.value[12:]), SIZES[item]
    all_same = _of_type(item, random) if item == F32 else packed(item, random.choice(range(-1, 9)))
    if random.random() < 0.4:
        body[:] = all_same * count
    else:
        for _ in range(random.choice([1, 5, 100])):
            at = size * random.randrange(count)
            body[at : at + size] = all_same
    p.value = array(item, count, bytes(body))


def _merges(parts: Parts, random: Random) -> None:
    p = parts.find(b"tokenizer.ggml.merges")
    found = [b"a b"] if p is None else strings(p.value)
    odd = [b"", b" ", b"ab", b"a b c", b"\xff \xfe", b"nothing here", b"a " + b"b" * 1000]
    ways = [[], found[:1], found[::-1], odd, found + odd, found * 2]
    parts.put(b"tokenizer.ggml.merges", ARRAY, of_strings(random.choice(ways)))


def _special(parts: Parts, random: Random) -> None:
    if random.random() < 0.25:
        value = BOOL, bytes([random.choice([0, 1, 2])])
        parts.put(f"tokenizer.ggml.{random.choice(FLAGS)}".encode(), *value)
        return
    key = f"tokenizer.ggml.{random.choice(SPECIAL)}".encode()
    parts.put(key, U32, packed(U32, random.choice(NUMBERS)))


def _kind(parts: Parts, random: Random) -> None:
    name = random.choice(TOKENIZERS).encode()
    parts.put(b"tokenizer.ggml.model", STRING, text(name))
    if name == b"gpt2" and random.random() < 0.7:
        found = [b"a b", b"t h", b"th e"]
        parts.put(b"tokenizer.ggml.merges", ARRAY, of_strings(found))


def _splitter(parts: Parts, random: Random) -> None:
    name = random.choice(SPLITTERS).encode()
    parts.put(b"tokenizer.ggml.pre", STRING, text(name))
    if random.random() < 0.7:
        parts.put(b"tokenizer.ggml.model", STRING, text(b"gpt2"))
        if parts.find(b"tokenizer.ggml.merges") is None:
            parts.put(b"tokenizer.ggml.merges", ARRAY, of_strings([b"a b"]))


def template(parts: Parts, random: Random) -> None:
    found = random.choice(TEMPLATES).encode(errors="surrogateescape")
    p = parts.find(b"tokenizer.chat_template")
    if p is not None and random.random() < 0.3:  # a sound one, changed
        body = bytearray(p.value[8:]) or bytearray(b"x")
        for _ in range(random.choice([1, 3])):
            body[random.randrange(len(body))] = random.choice(b"{}%|()[]'+*-/ x0\n")
        found = bytes(body)
    key = b"tokenizer.chat_template" + random.choice([b"", b"", b"", b".tool_use", b".default"])
    parts.put(key, STRING, text(found))


def counts(parts: Parts, random: Random) -> None:
    """Claims of more or fewer tensors or pairs than there are."""
    n_tensors, n_pairs = len(parts.tensors), len(parts.pairs)
    n = random.choice([0, 1, n_tensors + 1, max(n_tensors - 1, 0), 2**17, 2**31, 2**40, 2**64 - 1])
    parts.counts = (n, n_pairs) if random.random() < 0.5 else (n_tensors, n)


STRUCTURAL: dict[str, Change] = {
    change.__name__.replace("_", "-"): change
    for change in (
        metadata_value, metadata_type, metadata_missing, metadata_doubled, metadata_swapped,
        metadata_added, architecture, tensor_name, tensor_missing, tensor_doubled, tensor_shape,
        tensor_type, tensor_offset, tensor_data, vocabulary, template, counts,
    )
}  # fmt: skip


def _header_bytes(content: bytearray, header: int, random: Random) -> None:
    for _ in range(random.choice([1, 1, 2, 8])):
        content[random.randrange(header)] = random.randrange(256)


def _header_numbers(content: bytearray, header: int, random: Random) -> None:
    width = random.choice([4, 8])
    at = random.randrange(4, max(header - 8, 5))
    number = random.choice(NUMBERS) % 2 ** (8 * width)
    content[at : at + width] = number.to_bytes(width, "little")


def _truncation(content: bytearray, header: int, random: Random) -> None:
    place = random.choice([header, len(content), len(content)])
    cut = random.randrange(place) if random.random() < 0.7 else len(content) - random.randrange(99)
    if random.random() < 0.85:
        del content[max(cut, 0) :]
    else:
        content += random.randbytes(random.choice([1, 31, 4096]))


OF_BYTES: dict[str, Callable[[bytearray, int, Random], None]] = {
    "header-bytes": _header_bytes,
    "header-numbers": _header_numbers,
    "truncation": _truncation,
}
_PACKED = ("tensor-shape", "tensor-type", "tensor-missing", "tensor-doubled", "tensor-name")
KINDS = [*STRUCTURAL, *OF_BYTES]


def mutate(source: Path, random: Random) -> tuple[str, bytes]:
    """A wrong copy of a model, and the kind of what is wrong; "several" for several kinds."""
    parts = read_parts(source)
    kinds = random.sample(KINDS, 1 if random.random() < 0.8 else random.choice([2, 3]))
    for kind in kinds:
        if kind in STRUCTURAL and parts.tensors and parts.pairs:
            STRUCTURAL[kind](parts, random)
            # So that more than the tensors' places is wrong.
            if kind in _PACKED and random.random() < 0.7:
                parts.pack()
    content, header = parts.content(), len(parts.header())
    for kind in kinds:
        if kind in OF_BYTES and content:  # an earlier one may have cut the header, too
            OF_BYTES[kind](content, min(header, len(content)), random)
    return kinds[0] if len(kinds) == 1 else "several", bytes(content)
