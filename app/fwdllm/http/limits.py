"""Limits of what the server accepts."""

MAX_UPLOAD_BYTES = 64 * 2**20
# For every other request: enough for about 100 examples of the longest contexts.
MAX_BODY_BYTES = 8 * 2**20
MAX_EXAMPLES = 200_000
MAX_NAME_CHARACTERS = 255

MAX_FILES_BYTES = 4 * 2**30
MAX_ADAPTERS_BYTES = 4 * 2**30
MAX_UNFINISHED_JOBS = 16
# SQLite keeps up to 10^9 bytes in one place.
MAX_ADAPTER_BYTES = 900_000_000
# Adapters of one request, and how much more than themselves they may count.
MAX_LORAS = 8
MAX_LORA_SCALE = 100.0

# Requests that wait for the model or use it. Further ones would wait for minutes, so they get 429.
MAX_WAITING = 64
# The same for the engine, where each request occupies a thread.
MAX_WAITING_FOR_ENGINE = 8
# Open event streams, one for each open page.
MAX_STREAMS = 32

# Higher than anybody needs, and low enough that a request is not too expensive.
MAX_RANK = 256
# llama.cpp parses grammars by recursion; too deep a grammar would crash the process.
MAX_GRAMMAR_CHARACTERS = 16_384
MAX_GRAMMAR_DEPTH = 64
