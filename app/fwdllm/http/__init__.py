"""``fwdllm serve``: a local HTTP server around one model.

- database, store: files, jobs, events and adapters in one SQLite file
- worker, jobs, fine_tuning: tuning, in a process of its own
- models, schemas, completions: llama-cpp-python's ``Llama``, with adapters
- perturbations: losses and derivatives for apps that run their own protocol
- runs, stream: what the page at "/" shows
- security, api_error, limits, metrics: around all of them
- application, serve: putting it together
"""

from fwdllm.engine.llamacpp import native as native  # before schemas imports llama_cpp
