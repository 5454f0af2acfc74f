"""Faults under load: a mesh of tiny real models is hit at random, and no output may be lost, altered or leaked."""
