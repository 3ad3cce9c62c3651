"""From lines of JSONL to batches of tokens."""
