import html
import re
from typing import Any

import matplotlib.pyplot as plt
import pytest
from conftest import run
from pages import browse, check_html

from deme.report.tables import Commands, Picture, Table, render


@pytest.fixture
def page(tmp_path) -> dict[str, Any]:
    """All kinds of parts, with what HTML and Markdown have to escape, and a table wider than a phone."""
    figure = plt.figure(figsize=(2, 1))
    figure.savefig(tmp_path / "curve.png")
    plt.close(figure)
    table = Table(["a < b & c", *(f"column {k}" for k in range(30))], [["<script>", *map(str, range(30))]], "a note")
    parts = [
        "a paragraph, 1 < 2",
        table,
        Picture(tmp_path / "curve.png", 'a "caption"'),
        Commands(["python x.py 'a b'"]),
    ]
    sections = {"First": parts, "Second": ["more"]}
    return {"title": "a & b", "sections": sections, "missing": [("scores", "evaluate.py")], "folder": tmp_path}


def test_a_page_is_valid_and_a_browser_takes_it(tmp_path, page):
    file = tmp_path / "report.html"
    file.write_text(render("page.html", **page), encoding="utf-8")
    text = check_html(file)
    assert re.findall("<h2>(.*)</h2>", text) == ["First", "Second", "Not there yet"]
    assert "<script>" not in text
    assert html.escape("<script>") in text
    assert text.count('src="data:image/png;base64,') == 1
    browse(file)


def test_markdown_tells_the_same(page):
    text = render("page.md", **page)
    assert re.findall("^#+ (.*)", text, re.MULTILINE) == ["a & b", "First", "Second", "Not there yet"]
    assert '![a "caption"](curve.png)' in text
    assert "```bash\npython x.py 'a b'\n```" in text
    assert "| scores | `evaluate.py` |" in text


def test_an_incomplete_run_names_what_is_missing(config_file):
    """One of two experts is trained: everything else is named with the command that makes it."""
    run("finetune.py", config_file, "finetune.range=1")
    run("report.py", config_file)
    text = check_html(config_file.parent / "tiny" / "report.html")
    assert re.findall("<h2>(.*)</h2>", text) == ["Training", "How it was made", "Not there yet"]
    missing = re.findall("<code>(.*)</code>", text.split('id="missing"')[1])
    made = ["continued", "distilled"]
    expected = ["finetune.py finetune.range=0", *(f"finetune.py finetune.range={name}" for name in made)]
    neon = "merge.py merge.experts=[self] merge.coefficients=null merge.output=$(python merge.py --path neon)"
    expected += [neon, "search.py", "merge.py"]
    models = ["pretrained", "continued", "ensemble", "merged", "distilled", "neon"]
    expected += [f"sample_ddp.py sample.model={model}" for model in models]
    assert missing == [*expected, "evaluate.py", "analyze.py"]
