"""What both ends of the attach socket have to know."""

MAX_MESSAGE_BYTES = 4096
NUM_FDS = 4
"""Pool, grant page, doorbell and the worker's bell."""
