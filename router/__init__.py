"""The door of the mesh: validates, tokenizes, waits for credits, dispatches both phases, gives text back."""
