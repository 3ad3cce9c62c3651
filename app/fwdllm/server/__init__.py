"""``fwdllm serve``: a local HTTP server around one model.

- database, store: files, jobs, events and adapters in one SQLite file
- worker, jobs, fine_tuning: tuning, in a process of its own
- models, schemas, inference: llama-cpp-python's ``Llama``, with adapters
- perturbations: losses and derivatives for apps that run their own protocol
- runs, stream: what the page at "/" shows
- security, errors, limits, metrics: around all of them
- application, run: putting it together
"""

from fwdllm.engine import llama_native as llama_native  # before schemas imports llama_cpp
