"""The notebooks are small and clean, and run from top to bottom."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
PICTURES = {"prune_finetune_compare": 3, "see_the_ranking": 4, "train_a_ranker": 2}
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_three() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(PICTURES)


@every_notebook
def test_it_is_small_and_holds_nothing_but_pictures(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text) < 200_000
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {kind for output in outputs for kind in output["data"]} == {"image/jpeg"}
    assert 2 <= len(outputs) <= PICTURES[path.stem]
    assert {cell["execution_count"] for cell in code} == {None}
    for cell in code:
        compile("".join(cell["source"]), path.name, "exec")


@pytest.mark.elsewhere
@every_notebook
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("LTRP_TOY", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
    drawn = [picture for cell in notebook.cells for picture in pictures_of(cell)]
    assert len(drawn) == PICTURES[path.stem]
    for picture in drawn:
        pixels = np.asarray(picture.convert("L"))
        assert pixels.std() > 10  # something is drawn
    assert not list(tmp_path.glob("*.png"))  # and nothing lies about


def pictures_of(cell: Any) -> list[Image.Image]:
    found = [output.get("data", {}).get("image/png") for output in cell.get("outputs", ())]
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found if data]
