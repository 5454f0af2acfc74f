"""Generated code of the mesh-internal protos; see `v1`."""
