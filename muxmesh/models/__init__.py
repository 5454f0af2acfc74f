"""Models on disk: the catalog, download, GGUF import, the prepared weight image and the tokenizer. No torch."""
