"""GGUF files: the header, checked before anything is believed, and the mapped tensors."""
