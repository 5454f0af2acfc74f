"""The `muxmesh` command."""
