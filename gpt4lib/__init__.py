"""GPT-4, taken apart: predict what a model costs, and really do it.

The face of the library: specs and analysis, standard library only. Names load on first use, so
`import gpt4lib` costs nothing; the running half lives in gpt4lib.nn and below and needs PyTorch.
"""

from importlib import import_module as _import_module

__version__ = "0.1.0"

_HOMES = {
    "ModelSpec": "specs.model",
    "DeviceSpec": "specs.hardware", "ClusterSpec": "specs.hardware", "ParallelPlan": "specs.workload",
    "parameters": "analysis.parameters", "ParameterCount": "analysis.parameters",
    "Estimator": "analysis.estimator",
}
_MODULES = {"flops": "analysis.flops", "memory": "analysis.memory", "roofline": "analysis.roofline",
            "inference": "analysis.inference", "collectives": "analysis.collectives", "pipeline": "analysis.pipeline",
            "training": "analysis.training", "planner": "analysis.planner", "validation": "analysis.validation",
            "cost": "analysis.cost", "scaling_laws": "analysis.scaling_laws", "recorded": "recorded",
            "ledger": "ledger", "plotting": "plotting"}
__all__ = [*_HOMES, *_MODULES]


def __getattr__(name):
    if name in _HOMES:
        return getattr(_import_module(f"gpt4lib.{_HOMES[name]}"), name)
    if name in _MODULES:
        return _import_module(f"gpt4lib.{_MODULES[name]}")
    raise AttributeError(f"module 'gpt4lib' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
