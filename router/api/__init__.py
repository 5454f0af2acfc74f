"""The gRPC door of the router: the only modules of it that know the public messages."""
