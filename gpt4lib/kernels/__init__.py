"""Fast paths, each beside the plain oracle its tests compare it with."""
