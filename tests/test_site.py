"""The site builds strictly and fetches nothing; tables match docs/results/; the reference names
what exists. Whether a page reads well is not tested."""

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

_spec = importlib.util.spec_from_file_location("tables", DOCS / "results" / "tables.py")
tables = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tables)


def test_tables_of_pages_are_what_the_results_say():
    marked = 0
    for page in tables.pages():
        text = page.read_text(encoding="utf-8")
        marked += text.count("<!-- table: ")
        assert tables.written(text) == text, f"{page}: run python docs/results/tables.py"
    assert marked


def test_a_table_is_written_from_the_columns_that_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    rows = '[{"a": "x", "b": 0.680, "c": [1.50, 2]}, {"a": "y", "b": 4096}, {"a": "z", "c": 1}]'
    columns = json.dumps({"a": "A", "b": "B", "c": "C"})
    text = f'{{"tables": {{"t": {{"columns": {columns}, "rows": {rows}}}}}}}'
    (tmp_path / "r.json").write_text(text)
    page = "x\n<!-- table: r/t{} -->\nold\n<!-- /table -->\ny"
    assert tables.written(page.format("")).splitlines()[2:-2] == [
        "| A | B | C |",
        "| --- | --- | --- |",
        "| x | 0.680 | 1.50 to 2 |",
        "| y | 4,096 |  |",
        "| z |  | 1 |",
    ]
    assert tables.written(page.format(" a b")).splitlines()[4:-2] == [
        "| x | 0.680 |",
        "| y | 4,096 |",
    ]
    with pytest.raises(KeyError):
        tables.written(page.format(" a d"))


def test_rows_of_results_have_columns():
    for file in (DOCS / "results").glob("*.json"):
        for name, table in json.loads(file.read_text(encoding="utf-8"))["tables"].items():
            for row in table["rows"]:
                assert set(row) <= set(table["columns"]), (file.name, name)


def test_the_reference_names_what_there_is_and_all_that_is_public():
    import moss_audio_jax as mj

    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    named = []
    for path in re.findall(r"^::: (\S+)$", text, re.MULTILINE):
        module, name = path.rsplit(".", 1)
        named.append(getattr(importlib.import_module(module), name))
    missing = [name for name in mj.__all__ if getattr(mj, name) not in named]
    assert not missing


def test_the_site_builds_strictly_and_fetches_nothing(tmp_path):
    pytest.importorskip("mkdocs", reason="extra `docs`")
    pytest.importorskip("mkdocstrings", reason="extra `docs`")
    pytest.importorskip("material", reason="extra `docs`")
    site = tmp_path / "site"
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        fetched = re.findall(r'(?:src=|<link[^>]*href=)["\']?(?:https?:)?//[^"\'> ]+', html)
        assert not fetched, page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import )[\"']?(?:https?:)?//", sheet.read_text("utf-8"))
    tour = (site / "tour.html").read_text(encoding="utf-8")
    assert 'href="source/moss_audio_jax/audio/io.py.html"' in tour
    assert (site / "source/moss_audio_jax/audio/io.py.html").exists()
