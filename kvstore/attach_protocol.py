"""What both ends of the attach socket have to know."""

MAX_MESSAGE_BYTES = 4096
NUM_FDS = 4
"""Pool, grant page, doorbell and the worker's bell."""
BEAT_EVERY_S = 0.5
SILENT_LOOKS = 20
"""Looks of the unit at a heartbeat that did not change, after which its worker is killed: 10 s."""
