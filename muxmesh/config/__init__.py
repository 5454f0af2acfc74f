"""Configuration: what an operator writes (`schema`), how it is read (`load`), where a running mesh lives (`runtime`)."""
