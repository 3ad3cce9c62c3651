"""What a step needs in memory, and which weights stay in it."""
