"""``fwdllm serve``: a local HTTP server around one model.

- database, store: files, jobs, events and adapters in one SQLite file
- worker, jobs, fine_tuning: tuning, in a separate process
- models, schemas, completions: inference by llama-cpp-python's ``Llama``, with adapters
- grammar_process, grammar_worker: grammars in a process with limits
- perturbations: losses and derivatives for apps that run their own protocol
- runs, stream: what the page at "/" shows
- security, connections, bodies, api_error, limits, metrics: for all requests
- application, serve: the application, and starting the server
"""

from fwdllm.engine.llamacpp import native as native  # before schemas imports llama_cpp
