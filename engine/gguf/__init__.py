"""GGUF files: the header, checked before anything in it is used, and the mapped tensors."""
