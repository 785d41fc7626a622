"""Execute the notebooks of docs/ in full, and keep what they show: ``make notebooks``.

Progress lines, times and a second copy of each picture are left out: a notebook stays small,
and a diff shows what changed.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"


def kept(output):
    """Return whether an output stays: progress goes to stderr."""
    return output.get("name") != "stderr"


def run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if kept(output)]
            for output in cell.outputs:
                output.get("data", {}).pop("image/jpeg", None)
    notebook.metadata.language_info = {"name": "python"}
    path.write_text(nbformat.writes(notebook, indent=1) + "\n")


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        run(FOLDER / f"{name}.ipynb")
        print(f"docs/notebooks/{name}.ipynb")
