"""llama.cpp: the one door to it, its graphs as an engine of ours, and text from it."""
