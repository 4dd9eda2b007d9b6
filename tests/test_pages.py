"""The model and hardware pages say what the presets say."""

import importlib.util
from pathlib import Path

import pytest

from gpt4lib.analysis.parameters import parameters
from gpt4lib.specs import registry
from gpt4lib.specs.model import ModelSpec

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "tools" / "make_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("made, path", [("models", "models.md"), ("hardware", "hardware.md"),
                                        ("picture", "_static/parameters.svg")])
def test_what_was_generated_is_up_to_date(tool, made, path):
    written = (ROOT / path).read_text("utf8")
    assert written == getattr(tool, made)(), f"{path} is stale; run: python tools/make_tables.py"


def test_every_model_stands_there_with_its_exact_counts_and_weakest_status(tool):
    page = tool.models()
    for name in registry.names("models"):
        count = parameters(ModelSpec.preset(name))
        start = f"| `{name}` | {count.total:,} |"
        row = next(line for line in page.splitlines() if line.startswith(start))
        statuses = {source.status for source in registry.provenance("models", name).values()}
        assert f"| {count.active:,} |" in row
        assert ("inferred" in row) == ("inferred" in statuses)


def test_every_source_is_printed(tool):
    pages = {"models": tool.models(), "devices": tool.hardware(), "clusters": tool.hardware()}
    for kind, page in pages.items():
        for name in registry.names(kind):
            for source in registry.provenance(kind, name).values():
                assert tool.plain(source.source) in page


def test_the_number_that_opens_the_book_is_what_its_two_lines_give():
    code = (ROOT / "intro.md").read_text("utf8").split("```python\n")[1].split("```")[0]
    imports, expression = code.strip().splitlines()
    value, said = expression.split("#")
    scope: dict = {}
    exec(imports, scope)
    assert eval(value, scope) == int(said)
    assert 560e12 / int(said) == pytest.approx(1000, rel=0.01)     # "a thousand times less"
