import json
import re
from dataclasses import replace

import pytest
import yaml
from PIL import Image
from robustness.damaged_runs import make_run

import report
from deme.errors import UserError
from deme.job.records import SAMPLES, Record
from deme.measure.scores import load_scores, load_spaces, save_spaces
from deme.models.searched import read_searched
from deme.report.run import Run, cost_table

PLACES = {  # file of a run → title of the section that tells of it
    "results.json": "Results",
    "merged/merge.yaml": "Merging coefficients",
    "search/best.yaml": "Search",
    "search/report.json": "Search",
    "finetuned/0000-0250/log.jsonl": "Training",
}
DAMAGES = {
    "empty": b"",
    "not UTF-8": b"\xff\xfe\x00",
    "cut short": None,
    "a list": b"[1, 2]\n",
    "a number": b"1" * 400 + b"\n",
    "null": b"null\n",
    "deeply nested": b"[" * 100_000,
    "an empty mapping": b"{}\n",
}
BOMB = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 'x'}]\n" for n in range(30))
DAMAGES["an alias bomb"] = f"{BOMB}coefficients: {{'*': *a29}}\nprocessor: *a29\npasses: *a29\n".encode()
VALUES = [None, True, "x", -1.0, float("nan"), float("inf"), 1e300, 10**400, [], {}, [[]], {"a": 1}, ["x"]]


@pytest.fixture
def config(tmp_path):
    return make_run(tmp_path)


def page(config) -> dict[str, str]:
    """Title of a section → its HTML."""
    report.main(config)
    text = config.paths.report.read_text(encoding="utf-8")
    parts = re.split("<h2>(.*?)</h2>", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_a_whole_run_has_nothing_unreadable(config):
    sections = page(config)
    assert {*PLACES.values(), "Samples at equal seeds", "Analyses"} <= sections.keys()
    assert not [title for title, text in sections.items() if "Unreadable" in text or "Left out" in text]
    assert "-0.7500 ± 0.2500" in sections["Results"]
    assert "Objective fd: 0.5000, the pretrained network&#39;s 1.0000" in sections["Search"]


def test_results_may_have_any_name(config):
    file = config.paths.run_folder / "scores.txt"
    config.paths.results.rename(file)
    assert "-0.7500 ± 0.2500" in page(replace(config, evaluate=replace(config.evaluate, output=str(file))))["Results"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", PLACES)
def test_an_unreadable_file_is_told_in_its_place(config, file, damage, capsys):
    """The rest of the page is there, and the stage is not said to be missing. An empty log is one of no steps yet."""
    path = config.paths.run_folder / file
    content = DAMAGES[damage]
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    sections = page(config)
    if (damage, path.suffix) == ("empty", ".jsonl"):
        return
    assert f"Unreadable: {path}: " in sections[PLACES[file]]
    assert f"unreadable: {path}: " in capsys.readouterr().out
    others = {title for name, title in PLACES.items() if title != PLACES[file]}
    assert not [title for title in others if "Unreadable" in sections[title]]
    makers = {"results.json": "evaluate.py", "merged/merge.yaml": "merge.py", "search/best.yaml": "search.py"}
    assert f"<code>{makers.get(file)}</code>" not in sections["Not there yet"]


def replaced(value, path, new):
    """A copy of nested lists and mappings in which what lies at a path is another, or missing."""
    if not path:
        return new
    kept = dict(value) if isinstance(value, dict) else list(value)
    kept[path[0]] = replaced(kept[path[0]], path[1:], new)
    return kept


@pytest.mark.parametrize("key", ["images", "pooled", "blocks", "standard_deviation", "samples", "kid_standard_error"])
def test_values_of_other_types_in_results_are_named(config, key):
    """Wrong types, NaN, infinite and huge numbers, negative errors: none gets into a table."""
    file = config.paths.results
    whole = json.loads(file.read_text())
    for value in VALUES:
        fits = value is None and key in ("standard_deviation", "kid_standard_error")
        if fits or (value, key) in [(-1.0, "pooled"), ("x", "samples")]:
            continue
        file.write_text(json.dumps(replaced(whole, ["rows", 1, key], value)))
        with pytest.raises(UserError, match=rf"results\.json: not the results of evaluate\.py: rows\[1\]\.{key}"):
            load_scores(file)


@pytest.mark.parametrize("key", ["coefficients", "value", "passes", "objective", "finetuned"])
def test_values_of_other_types_in_coefficients_are_named(config, key):
    file = config.paths.best_coefficients
    whole = yaml.safe_load(file.read_text())
    for value in VALUES:
        if value is None and key != "coefficients":
            continue
        fits = (key, value) in [("objective", "x"), ("value", -1.0), ("finetuned", []), ("finetuned", ["x"])]
        if fits or (key, value) == ("coefficients", {}):
            continue
        file.write_text(yaml.safe_dump(whole | {key: value}))
        with pytest.raises(UserError, match=rf"best\.yaml: not the coefficients of search\.py: {key}"):
            read_searched(file)


def test_a_value_of_a_file_is_taken_as_it_stands(config, monkeypatch):
    """An environment variable named in results is not put in its place."""
    monkeypatch.setenv("SECRET", "a-secret")
    file = config.paths.results
    file.write_text(file.read_text().replace("a/merged", "${oc.env:SECRET}"))
    assert load_scores(file)[1][1].samples == "${oc.env:SECRET}"
    sections = page(config)
    assert "a-secret" not in "".join(sections.values())


def test_passwords_in_urls_are_not_told(config, monkeypatch):
    """Neither those of the command nor those of the configuration."""
    monkeypatch.setattr("sys.argv", ["report.py", "search.storage=postgresql://me:secret@host/db"])
    data = replace(config.data, name="https://you:hidden@host/images")
    text = page(replace(config, data=data))["How it was made"]
    assert "search.storage=postgresql://…" in text
    assert "https://***@host/images" in text
    assert not re.search("secret|hidden", text + config.paths.report.with_suffix(".md").read_text())


def test_names_stay_in_their_cell(config):
    """Also those that matplotlib would take for formulas, and Markdown for two cells."""
    file = config.paths.results
    file.write_text(file.read_text().replace("a/merged", "a/$x^{$ | <b>"))
    assert "<b>" not in page(config)["Results"].replace("&lt;b&gt;", "")
    rows = [line for line in config.paths.report.with_suffix(".md").read_text().splitlines() if "x^{" in line]
    assert rows[0].startswith("| $x^{$ \\| <b> | 4 |")


def test_coefficients_of_other_ranges_are_not_drawn(config):
    fewer = replace(config, timesteps=replace(config.timesteps, num_ranges=2))
    assert "its coefficients are not those of timesteps.num_ranges=2" in page(fewer)["Merging coefficients"]


def test_coefficients_of_self_trained_networks_are_drawn(config):
    """Each merged network has a column, by its name."""
    merged = replace(config, merge=replace(config.merge, experts=["ranges", "self"]))
    file = config.paths.merged / "merge.yaml"
    file.write_text(yaml.safe_dump({"coefficients": {"*": [0.25, 0.25, 0.25, 0.25, -1.0]}}))
    text = page(merged)["Merging coefficients"]
    assert re.findall("<th>(.*?)</th>", text) == ["tensors", *config.timesteps.names, "self"]
    assert re.findall("<td>(.*?)</td>", text)[-1] == "-1"


def test_what_each_network_moved_is_drawn_where_the_merge_knows_it(config):
    file = config.paths.merged / "merge.yaml"
    content = yaml.safe_load(file.read_text())
    assert "report-moved" not in page(config)["Merging coefficients"]  # an older version's
    moved = {"down_blocks.0": [0.5, -0.25, 0.0, 1.0], "rest": [0.1] * 4}
    file.write_text(yaml.safe_dump(content | {"moved": moved}))
    assert "How far each network moves each block" in page(config)["Merging coefficients"]
    assert (config.paths.plots / "report-moved.png").is_file()
    for damaged in ([1], {"rest": ["x"] * 4}, {"rest": [0.1]}):
        file.write_text(yaml.safe_dump(content | {"moved": damaged}))
        text = page(config)["Merging coefficients"]
        assert "How far each network moves" not in text
        assert "moved" in text


@pytest.mark.parametrize("name", ["plots/analysis-a.png", "plots/search-cost.png", "samples/merged/000000.png"])
def test_a_link_to_a_file_outside_of_the_run_is_not_shown(config, tmp_path, name):
    """A page is sent to others: what somebody's link leads to is not in it. A link within the run is followed."""
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8), (1, 2, 3)).save(secret)
    path = config.paths.run_folder / name
    path.unlink()
    path.symlink_to(secret)
    text = "".join(page(config).values())
    assert f"Left out: {path} is a link to a file outside of the run." in text
    inside = config.paths.run_folder / "inside.png"
    secret.rename(inside)
    path.unlink()
    path.symlink_to(inside)
    assert "Left out" not in "".join(page(config).values())


@pytest.mark.parametrize("name", ["plots/analysis-a.png", "plots/search-cost.png", "samples/merged/000000.png"])
def test_a_picture_that_was_cut_short_is_left_out(config, name):
    path = config.paths.run_folder / name
    path.write_bytes(path.read_bytes()[:60])
    assert f"Left out: {path} is not a readable PNG" in "".join(page(config).values())


def test_samples_of_other_names_and_sizes(config):
    """A copy that a file manager made is no seed; images of other sizes stand side by side but are not subtracted."""
    folder = config.paths.all_samples / "merged"
    for model in ("merged", "pretrained"):
        (config.paths.all_samples / model / "000000 (copy).png").write_bytes(b"")
    Image.new("L", (16, 16)).save(folder / "000000.png")
    text = page(config)["Samples at equal seeds"]
    assert text.count("<figure>") == 1
    assert "differences of images of other sizes" in text


def test_every_judge_has_its_tables_and_picture(config):
    """The first one's alone say what they always said."""
    before = page(config)["Results"]
    spaces, name = load_spaces(config.paths.results), "dinov2-vitl14-0123abcd"
    save_spaces(config.paths.results, spaces | {name: spaces["classifier"]}, {})
    after = page(config)["Results"]
    assert after.startswith(before.rstrip()[:200])
    assert (before.count("<figure>"), after.count("<figure>")) == (1, 2)
    assert f"by -0.7500 ± 0.2500 in {name} FD" in after
    assert (config.paths.plots / f"report-results-{name}.png").is_file()


def test_a_run_that_is_read_tells_its_numbers(config):
    """What `make_run` wrote, each from its file."""
    run = Run(config)
    [log] = run.logs
    assert (log.name, log.steps, log.losses) == ("0000-0250", [1, 2, 4], [1, 0.5, 0.25])
    assert log.seconds == pytest.approx(4 * config.finetune.batch_size / 5)
    assert run.coefficients == {"up.*": [0.5, 0.25, 0.0, 1.0], "*": [0.25] * 4}
    assert (run.search.value, run.search.value_of_pretrained, run.search.passes) == (0.5, 1.0, 10)
    assert (run.features, run.search_features, run.search_seconds) == ("classifier", "classifier", 3.5)
    assert run.provenance.versions == {"torch": "2"}


def test_the_passes_of_a_drawing_are_those_of_its_record(config):
    """Not steps, which a sampler of higher order and guidance double; '-' where nothing tells."""
    folder = config.paths.all_samples / "merged"
    content = json.loads(config.paths.results.read_text())
    config.paths.results.write_text(json.dumps(replaced(content, ["rows", 1, "samples"], str(folder))))
    Record(SAMPLES, {}, {"num_images": 4, "passes": 9}).write(folder)
    assert cost_table(Run(config)).rows[-2:] == [["drawing pretrained", "-", "-"], ["drawing merged", "36", "-"]]
    Record(SAMPLES, {}, {"num_images": 4, "passes": "x"}).write(folder)
    assert f"Unreadable: {folder / 'samples.yaml'}: not the record of samples: passes" in page(config)["Results"]
    config.paths.results.write_text(json.dumps(replaced(content, ["rows", 1, "samples"], "a" * 5000)))
    assert cost_table(Run(config)).rows[-1][1] == "-"
