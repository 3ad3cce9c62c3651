"""LoRA adapters and heads in memory, and as GGUF files and PEFT folders."""
