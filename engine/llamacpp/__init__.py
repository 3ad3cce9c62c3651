"""llama.cpp: loading it safely, its graphs behind our own interface, and text generation by it."""
