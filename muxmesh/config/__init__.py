"""Configuration: the fields of mesh.yaml (`schema`), its parser (`load`) and the addresses of a mesh (`runtime`)."""
