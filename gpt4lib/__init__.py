"""GPT-4, taken apart: predict what a model costs, and really do it.

The face of the library: specs and analysis, standard library only. Names load on first use, so
`import gpt4lib` costs nothing; the running half lives in gpt4lib.nn and below and needs PyTorch.
"""

from importlib import import_module as _import_module

__version__ = "0.1.0"

_HOMES = {"ModelSpec": "specs", "DeviceSpec": "specs", "ClusterSpec": "specs", "ParallelPlan": "specs",
          "parameters": "analysis.parameters", "ParameterCount": "analysis.parameters", "Estimator": "analysis.estimator",
          "ServingEstimator": "analysis.serving_estimator"}
_ANALYSES = ("flops", "memory", "roofline", "inference", "collectives", "pipeline", "training", "planner", "validation", "cost",
             "efficiency", "scaling_laws")
_MODULES = {name: f"analysis.{name}" for name in _ANALYSES} | {name: name for name in ("recorded", "ledger", "plotting")}
__all__ = [*_HOMES, *_MODULES]


def __getattr__(name):
    if name in _HOMES:
        return getattr(_import_module(f"gpt4lib.{_HOMES[name]}"), name)
    if name in _MODULES:
        return _import_module(f"gpt4lib.{_MODULES[name]}")
    raise AttributeError(f"module 'gpt4lib' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
