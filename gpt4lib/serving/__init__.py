"""Serving: sequences, blocks of cache, a scheduler that knows neither torch nor clocks."""
