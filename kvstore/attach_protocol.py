"""What both ends of the attach socket have to know."""

MAX_MESSAGE_BYTES = 4096
NUM_FDS = 6
"""Pool, swap region, grant page, doorbell, the worker's bell and its progress page."""
BEAT_EVERY_S = 0.5
SILENT_LOOKS = 20
"""Looks of the unit at a heartbeat that did not change, after which its worker is killed: 10 s."""
