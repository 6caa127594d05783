"""GGUF, the file format of llama.cpp: `unpack` reads a model from it, `write` makes one of a model."""
