"""How much memory a step needs, and which weights stay in memory."""
