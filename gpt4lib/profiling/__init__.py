"""What the running code actually used: parameters, FLOPs, bytes, and what went over the wire."""

from gpt4lib.profiling.counters import count_flop, count_parameters, experts_touched, forward_flop, kv_cache_bytes
from gpt4lib.profiling.kept import Kept
from gpt4lib.profiling.wire import count_wire

__all__ = ["Kept", "count_flop", "count_parameters", "count_wire", "experts_touched", "forward_flop", "kv_cache_bytes"]
