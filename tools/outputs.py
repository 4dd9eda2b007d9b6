"""Re-execute chapters in place, leaving nothing in them that depends on the machine or the clock."""

import pathlib
import subprocess
import sys

import nbformat
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[1]


def changed() -> list[pathlib.Path]:
    """Chapters that differ from the last commit; all of them outside a git checkout."""
    chapters = sorted((ROOT / "chapters").glob("*.ipynb"))
    git = subprocess.run(["git", "status", "--porcelain", "chapters"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode:
        return chapters
    return [p for p in chapters if p.name in git.stdout]


def joined(outputs: list) -> list:
    """A stream that arrived in pieces as one, so that the page does not depend on when the kernel flushed."""
    whole: list = []
    for output in outputs:
        if whole and output.output_type == whole[-1].output_type == "stream" and output.name == whole[-1].name:
            whole[-1].text += output.text
        else:
            whole.append(output)
    return whole


def execute(path: pathlib.Path) -> None:
    """Run a chapter top to bottom in its own folder and write it back, normalised."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, kernel_name="python3", timeout=600, record_timing=False,
                   resources={"metadata": {"path": str(path.parent)}}).execute()
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                         "language_info": {"name": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"{path.stem.partition('_')[2]}-{number:02d}"
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
    unfinished = path.with_suffix(".tmp")
    nbformat.write(notebook, unfinished)
    unfinished.replace(path)


if __name__ == "__main__":
    for path in [pathlib.Path(p).resolve() for p in sys.argv[1:]] or changed():
        print(f"executing {path.name}")
        execute(path)
