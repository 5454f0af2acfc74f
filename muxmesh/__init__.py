"""MuxMesh serves several large language models from the same few devices, over gRPC."""

__version__ = "0.1.0"
