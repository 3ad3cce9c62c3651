"""``fwdllm serve``: a local HTTP server around one model.

- store: files, jobs, events and adapters in one SQLite file
- worker, jobs: fine-tuning, in a process of its own
- models, inference: llama-cpp-python's server, with adapters
- perturbations: losses and derivatives for apps that run their own protocol
- runs, stream: what the page at "/" shows
- security, errors, metrics: around all of them
"""
