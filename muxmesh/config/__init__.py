"""Configuration: what an operator writes (`schema`), how it is read (`load`), where a mesh lives (`runtime`)."""
