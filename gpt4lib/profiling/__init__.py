"""What the running code actually used: parameters, FLOPs, bytes."""

from gpt4lib.profiling.counters import count_flop, count_parameters, experts_touched, kv_cache_bytes

__all__ = ["count_flop", "count_parameters", "experts_touched", "kv_cache_bytes"]
