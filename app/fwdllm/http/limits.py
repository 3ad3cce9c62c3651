"""Limits of what the server accepts."""

MAX_UPLOAD_BYTES = 64 * 2**20
# For every other request: enough for about 100 examples of the longest contexts.
MAX_BODY_BYTES = 8 * 2**20
# In a JSON body: the head of 1000 labels has 400,000 numbers. Reading so many takes 0.1 s.
MAX_BODY_VALUES = 1_000_000
MAX_WAITING_BODIES = 32  # of more than 32 KiB
# Fields of an object that is checked, if it is said nowhere else.
MAX_FIELDS = 256
MAX_MESSAGES = 2048  # as of OpenAI
MAX_STOPS = 64  # each is looked for at every token
MAX_BIASES = 4096
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

# Open connections, of the 1024 files that a process may have open on most systems.
MAX_CONNECTIONS = 512
# The head of a request, and its body with what it gains by its length (mod_reqtimeout of Apache:
# header=20, body=20,MinRate=500), and a client that reads nothing (send_timeout of nginx).
REQUEST_SECONDS = 20.0
MIN_BYTES_PER_SECOND = 500
READER_SECONDS = 60.0

# Higher than anybody needs, and low enough that a request is not too expensive.
MAX_RANK = 256
# A grammar, and what it may take in its own process: of CPU at once and for each token, and of
# memory. Schemas of a page take 10 ms a token and 1 MB with a vocabulary of 50,000 tokens.
MAX_GRAMMAR_CHARACTERS = 16_384
GRAMMAR_SECONDS = 1.0
GRAMMAR_SECONDS_PER_TOKEN = 0.1
MAX_GRAMMAR_BYTES = 256 * 2**20
# Grammars that are being checked or wait for it.
MAX_WAITING_GRAMMARS = 16
