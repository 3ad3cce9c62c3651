"""How much the server takes."""

MAX_UPLOAD_BYTES = 64 * 2**20
# Of every other request: some 100 examples of the longest contexts.
MAX_BODY_BYTES = 8 * 2**20
MAX_EXAMPLES = 200_000
MAX_NAME_CHARACTERS = 255

MAX_FILES_BYTES = 4 * 2**30
MAX_ADAPTERS_BYTES = 4 * 2**30
MAX_UNFINISHED_JOBS = 16

# Requests that wait for the model or have it. More would wait for minutes; better they know.
MAX_WAITING = 64
# The same for the engine, whose requests hold a thread each.
MAX_WAITING_FOR_ENGINE = 8
# Pages that are open.
MAX_STREAMS = 32

# Beyond any use, and within what a request may cost.
MAX_RANK = 256
# llama.cpp reads grammars by recursion, which ends the process if it goes too deep.
MAX_GRAMMAR_CHARACTERS = 16_384
MAX_GRAMMAR_DEPTH = 64
