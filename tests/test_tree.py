"""The house: which rooms there are, who may know whom, and how large they may get."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LIBRARY = ROOT / "gpt4lib"
SOURCES = sorted(LIBRARY.rglob("*.py"))
ROOMS = "specs analysis nn kernels distributed serving profiling ledger plotting".split()
HEAVY = ("torch", "numpy", "transformers", "matplotlib", "triton")

# room -> what it may never import
FORBIDDEN = {
    "specs": (*HEAVY, "gpt4lib.analysis", "gpt4lib.nn", "gpt4lib.ledger"),
    "analysis": (*HEAVY, "gpt4lib.nn", "gpt4lib.kernels", "gpt4lib.profiling", "gpt4lib.ledger"),
    "ledger": (*HEAVY, "gpt4lib.nn"),
    "nn": ("gpt4lib.analysis", "gpt4lib.ledger", "transformers"),
    "kernels": ("gpt4lib.analysis", "gpt4lib.nn", "gpt4lib.ledger"),
    "distributed": ("gpt4lib.analysis", "gpt4lib.ledger"),
    "profiling": ("gpt4lib.analysis", "gpt4lib.ledger"),
    "serving": ("gpt4lib.analysis", "gpt4lib.ledger"),      # simulator.py is the one exception
    "plotting": ("torch", "gpt4lib.nn"),
    "serving/scheduler.py": ("torch", "time", "numpy"),
    "serving/block_pool.py": ("torch", "time", "numpy"),
}


def imports(source: str) -> set[str]:
    """Every module a source names in an import, at any depth of the code."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return found


def offences(source: str, forbidden: tuple[str, ...]) -> set[str]:
    return {m for m in imports(source) for f in forbidden if m == f or m.startswith(f + ".")}


@pytest.mark.parametrize("place", FORBIDDEN)
def test_who_may_know_whom(place):
    files = [p for p in SOURCES if p.relative_to(LIBRARY).as_posix().startswith(place) and p.name != "simulator.py"]
    assert files and {str(p): bad for p in files if (bad := offences(p.read_text("utf8"), FORBIDDEN[place]))} == {}


@pytest.mark.parametrize("source", ["import torch", "from torch import nn", "def f():\n    import torch.nn as x",
                                    "from gpt4lib import analysis", "from gpt4lib.analysis.flops import forward"])
def test_an_offence_would_be_found(source):
    assert offences(source, ("torch", "gpt4lib.analysis"))


@pytest.mark.parametrize("module", ["gpt4lib", "gpt4lib.specs", "gpt4lib.specs.huggingface", "gpt4lib.analysis.inference", "gpt4lib.analysis.validation", "gpt4lib.analysis.planner",
                                    "gpt4lib.ledger", "gpt4lib.cli", "gpt4lib.problems", "gpt4lib.serving.scheduler",
                                    "gpt4lib.distributed.schedule", "gpt4lib.distributed.grid"])
def test_the_predicting_half_loads_the_standard_library_only(module):
    code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_the_probe_sees_what_is_loaded():
    code = f"import sys, gpt4lib.nn.transformer; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True\n"


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_is_lived_in(room):
    assert any(len(ast.parse(p.read_text("utf8")).body) > 2 for p in (LIBRARY / room).glob("*.py"))


def code_lines(source: str) -> int:
    """Lines that are neither blank, nor a comment, nor part of a docstring."""
    documented = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return sum(bool(line.strip()) and not line.strip().startswith("#") and i not in documented
               for i, line in enumerate(source.splitlines(), 1))


def test_small_is_a_promise():
    """Under 330 lines a file, and about 6,000 lines of code in all: the line is drawn at 7,000."""
    sources = {str(p): p.read_text("utf8") for p in SOURCES}
    assert {p: n for p, s in sources.items() if (n := s.count("\n")) > 330} == {}
    assert sum(map(code_lines, sources.values())) < 7000


def test_lines_of_code_are_counted():
    assert code_lines('"""Two\nlines."""\n\n# why\nx = 1\ndef f():\n    """One."""\n    return x  # what\n') == 3


def test_the_library_neither_prints_nor_reads_the_environment():
    """Only the command line prints; one place reads what torchrun left in the environment."""
    for p in SOURCES:
        calls = {n.func.id for n in ast.walk(ast.parse(p.read_text("utf8")))
                 if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        assert p.name in ("cli.py", "page.py") or "print" not in calls, p
        assert p.name == "launch.py" or "environ" not in p.read_text("utf8"), p
