"""Models on disk: catalog, download, GGUF import, model spec, weight image and tokenizer. Imports no torch."""
