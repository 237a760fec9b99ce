"""The report of run directories, read back with an HTML parser; test_report_in_browser.py opens it in a browser."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plotly.offline import get_plotlyjs
from recorded_runs import TOKENS_PER_STEP, evaluation, phase, step, write_run, write_two_phases

from megacl.errors import CheckpointError, DataError
from megacl.lineage import BranchRecord, CheckpointMark, Lineage, MergedCheckpoint, MergeRecord, load_lineage
from megacl.report import duration, render_report, save_report, short
from megacl.report_plots import thinned


class Page(HTMLParser):
    """What a reader would make of a page: tables as lists of rows, figures, texts, and each attribute that loads."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.figures: dict[str, dict] = {}
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self._text: list[str] = []
        self._figure = ""
        self.feed(html.replace(get_plotlyjs(), ""))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        self.loads += [str(given[name]) for name in ("src", "href", "srcset", "data", "action") if name in given]
        self._text = []
        self._figure = given.get("id", "") if given.get("type") == "application/json" else ""
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])

    def handle_data(self, data):
        self._text.append(data)

    def handle_endtag(self, tag):
        text = "".join(self._text)
        if tag in ("td", "th"):
            self.tables[-1][-1].append(text)
        elif tag == "script" and self._figure:
            self.figures[self._figure] = json.loads(text)
        elif tag not in ("script", "style"):
            self.words.append(text.strip())
        self._text = []


def values(array) -> list[float]:
    """A figure's array, which Plotly writes as base64 of little-endian numbers."""
    return np.frombuffer(base64.b64decode(array["bdata"]), np.dtype(array["dtype"])).tolist()


def test_the_matrix_has_the_losses_behind_each_phase_in_both_units(tmp_path):
    page = Page(render_report([write_two_phases(tmp_path / "run")]))
    head = ["behind", "english", "german", "learned", "retained", "forgetting", "backward", "forward"]
    dash, none = "–", [""] * 5
    assert page.tables[0] == [
        head,
        ["before", "8.000", "8.250", dash, dash, dash, dash, dash],
        ["english", "5.000*", "7.500", "5.000", dash, dash, dash, dash],
        ["german", "5.125", "5.500*", "5.500", "5.125", "+0.125", "−0.125", "+0.750"],
        ["learned", "5.000", "5.500", *none],
        ["forgetting", "+0.125", "+0.000", *none],
        ["backward", "−0.125", dash, *none],
        ["forward", dash, "+0.750", *none],
    ]
    # recorded_runs.py has four bytes a token: a nat a token is 1 / (4 ln 2) = 0.3607 bits a byte
    assert page.tables[1][3] == ["german", "1.848", "1.984*", "1.984", "1.848", "+0.045", "−0.045", "+0.271"]


def went_back(folder):
    """A run of six steps that went back from step 3, whose update was skipped, to step 1."""
    records = [
        step(number, phase="english", tokens=TOKENS_PER_STEP * learned, applied=number != 3)
        for number, learned in enumerate([1, 2, 2, 2, 3, 4], 1)
    ]
    back = {"kind": "go_back", "step": 3, "phase": "english", "to_step": 1, "passed_over": [32, 96]}
    whole = phase("run", "english", 6, {"english": 1.0})
    return write_run(
        folder,
        [replace(whole, passed_over=((32, 96),), tokens=4 * TOKENS_PER_STEP)],
        [*records[:3], back, *records[3:]],
    )


def test_where_a_run_went_back_is_said_and_its_curves_have_a_gap_there(tmp_path):
    page = Page(render_report([went_back(tmp_path / "run")]))
    line = "run went back from step 3 to step 1, and passed over samples 32 to 96 of phase english."
    assert line in page.words
    tokens = values(page.figures["figure-loss"]["data"][0]["x"])
    np.testing.assert_array_equal(tokens, np.multiply([1, 2, 2, np.nan, 2, 3, 4], TOKENS_PER_STEP))
    assert "192, 64 passed over" in page.tables[-1][1]


def test_one_run_is_summed_up_in_a_line(tmp_path):
    page = Page(render_report([write_two_phases(tmp_path / "run")]))
    # 2 x 512 x 32 embeddings; a layer of width 32 has 12 x 32^2 + 13 x 32 parameters; 2 x 32 of the last norm
    parameters = 2 * 512 * 32 + 2 * (12 * 32**2 + 13 * 32) + 2 * 32
    assert parameters == 58_240
    line = "58.2K parameters · phases: english, german · 164K tokens seen · 10.0 s of training · median 16.4K tokens/s"
    assert line in page.words


def test_the_lineage_is_a_table_of_phases(tmp_path):
    page = Page(render_report([write_two_phases(tmp_path / "run")]))
    rows = page.tables[2]
    assert rows[1][:6] == ["run", "english", "81.9K", "320", "32 × 256", "english: 100%, 0.50"]
    assert rows[2][6:] == ["1/4 of samples (english: 80)", "cosine: max_lr 0.001, min_lr 0.0001, warmup 1%", "new"]
    assert rows[1][6] == "none"


def test_branches_and_merges_stand_between_the_phases(tmp_path):
    run = write_two_phases(tmp_path / "run")
    english, german = load_lineage(run).phases
    lineage = Lineage(phases=(english,))
    mark = {"run": "other", "step": 10, "tokens": 81_920, "id": lineage.id, "weights": "12" * 32}
    lineage = lineage.with_event(BranchRecord(after=1, checkpoint=CheckpointMark(**mark)))
    merged = MergedCheckpoint(**{**mark, "id": lineage.id}, weight=1.0)
    lineage = lineage.with_event(MergeRecord(name="release", after=1, shape="linear", checkpoints=(merged,)))
    (run / "lineage.json").write_text(replace(lineage, phases=(english, german)).dump())
    rows = [row[1] for row in Page(render_report([run])).tables[2][1:]]
    assert rows[0] == "english"
    assert rows[1].startswith("branch from other@10, 81,920 tokens")
    assert rows[2] == "merge release of 1 checkpoints, shape linear"
    assert rows[3] == "german"


def test_the_plots_hold_what_the_metrics_say(tmp_path):
    page = Page(render_report([write_two_phases(tmp_path / "run")]))
    training, english, german = page.figures["figure-loss"]["data"]
    assert (english["name"], german["name"]) == ("english", "german")
    assert values(english["x"]) == [TOKENS_PER_STEP * each for each in (0, 5, 10, 20)]
    assert values(english["y"]) == [8.0, 6.5, 5.0, 5.125]
    assert values(german["y"]) == [8.25, 7.75, 7.5, 5.5]
    assert values(training["y"]) == pytest.approx([8 - each / 10 for each in range(1, 21)])
    rates = page.figures["figure-lr"]["data"][0]
    assert values(rates["x"]) == [TOKENS_PER_STEP * each for each in range(1, 21)]
    assert values(rates["y"]) == pytest.approx([1e-3 * (1 - each / 40) for each in range(1, 21)])
    assert values(page.figures["figure-tokens_per_second"]["data"][0]["y"]) == [16384.0] * 20
    assert values(page.figures["figure-grad_norm"]["data"][0]["y"]) == [1.0] * 20


def test_phases_are_marked_and_named_where_they_begin(tmp_path):
    layout = Page(render_report([write_two_phases(tmp_path / "run")])).figures["figure-loss"]["layout"]
    assert [(each["text"], each["x"]) for each in layout["annotations"]] == [
        ("english", 0.0),
        ("german", 10.0 * TOKENS_PER_STEP),
    ]
    assert [each["x0"] for each in layout["shapes"]] == [10.0 * TOKENS_PER_STEP]


def continued(folder, loss_of_english: float):
    """A run that goes on from 10 steps of another one, on German."""
    start = 10 * TOKENS_PER_STEP
    end = start + 5 * TOKENS_PER_STEP
    records = [evaluation(0, phase="german", tokens=start, at="start", losses={"english": 5.0, "german": 7.5})]
    records += [step(each, phase="german", tokens=start + each * TOKENS_PER_STEP) for each in range(1, 6)]
    losses = {"english": loss_of_english, "german": 6.0}
    records.append(evaluation(5, phase="german", tokens=end, at="end", losses=losses))
    phases = [phase("base", "english", 10, {"english": 1.0}), phase(folder.name, "german", 5, {"german": 1.0})]
    return write_run(folder, phases, records)


def test_several_runs_are_compared_in_one_table_and_in_the_same_plots(tmp_path):
    first, second = continued(tmp_path / "plain", 6.25), continued(tmp_path / "replay", 5.0625)
    page = Page(render_report([first, second]))
    summary, matrix = page.tables[:2]
    assert [row[0] for row in summary] == ["run", "plain", "replay"]
    assert summary[1][-2:] == ["6.250", "6.000"]
    assert matrix[0][:4] == ["behind", "run", "english", "german"]
    assert [row[:4] for row in matrix[1:5]] == [
        ["english", "plain", "5.000*", "7.500"],
        ["english", "replay", "5.000*", "7.500"],
        ["german", "plain", "6.250", "6.000*"],
        ["german", "replay", "5.062", "6.000*"],
    ]
    assert [row[:3] for row in matrix[7:9]] == [["forgetting", "plain", "+1.250"], ["forgetting", "replay", "+0.062"]]
    names = [trace["name"] for trace in page.figures["figure-loss"]["data"]]
    assert names[:2] == ["training loss, plain", "training loss, replay"]
    assert names[2:] == ["english, plain", "german, plain", "english, replay", "german, replay"]
    looks = [(each["line"]["color"], each["line"]["dash"]) for each in page.figures["figure-loss"]["data"][2:]]
    assert len(set(looks)) == 4
    assert looks[0][0] == page.figures["figure-lr"]["data"][0]["line"]["color"]  # a run's colour is the same everywhere
    annotations = page.figures["figure-loss"]["layout"]["annotations"]
    assert [each["text"] for each in annotations] == ["german"]  # english ended where these runs begin


def test_runs_whose_folders_are_called_the_same_keep_their_paths(tmp_path):
    first, second = write_two_phases(tmp_path / "a" / "run"), write_two_phases(tmp_path / "b" / "run")
    summary = Page(render_report([first, second])).tables[0]
    assert [row[0] for row in summary[1:]] == [str(first), str(second)]


def test_the_page_loads_nothing_and_forbids_it(tmp_path):
    html = render_report([write_two_phases(tmp_path / "run")])
    page = Page(html)
    assert page.loads == []
    assert not {"link", "iframe", "img", "base", "object", "embed"} & set(page.tags)
    assert "default-src 'none'" in html
    assert html.count(get_plotlyjs()) == 1
    style = html[html.index("<style>") : html.index("</style>")]
    assert "@import" not in style
    assert "url(" not in style


def test_a_folder_is_no_name_for_a_report(tmp_path):
    with pytest.raises(DataError, match="name a file"):
        save_report([write_two_phases(tmp_path / "run")], tmp_path)


@pytest.mark.parametrize("name", ["<script>alert(1)", "a&amp;b", '"><img src=x onerror=alert(1)>', "{{x}}%{y}"])
def test_names_out_of_files_are_text_and_never_markup(tmp_path, name):
    clean = Page(render_report([write_two_phases(tmp_path / "clean")]))
    page = Page(render_report([write_two_phases(tmp_path / name, german=name)]))
    assert name in page.words
    assert page.tables[0][0][1:3] == ["english", name]
    assert page.tags == clean.tags  # no element more or less than with harmless names
    drawn = page.figures["figure-loss"]["data"][-1]["name"]  # Plotly takes tags and entities for markup
    assert "<" not in drawn
    assert re.fullmatch(r"(?:[^&]|&(?:amp|lt|gt);)*", drawn)


def test_the_configuration_and_the_command_stand_in_the_page(tmp_path):
    folder = write_two_phases(tmp_path / "my run")
    page = Page(render_report([folder]))
    assert (folder / "config.yaml").read_text().strip() in page.words
    assert f"megacl report '{folder}' --out report.html" in page.words


def test_a_report_is_published_whole_into_a_new_folder(tmp_path):
    out = tmp_path / "reports" / "first.html"
    save_report([write_two_phases(tmp_path / "run")], out)
    assert [each.name for each in out.parent.iterdir()] == ["first.html"]
    assert out.read_text().endswith("</html>\n")


def test_a_report_that_cannot_be_written_says_so(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(DataError, match="file"):
        save_report([write_two_phases(tmp_path / "run")], blocked / "report.html")


def test_a_loss_that_is_not_finite_leaves_a_gap_and_a_dash(tmp_path):
    records = [
        step(1, phase="english", tokens=8192, loss=None, grad_norm=None),
        step(2, phase="english", tokens=16384),
        evaluation(0, phase="english", tokens=0, at="start", losses={"english": 6.0}),
        evaluation(2, phase="english", tokens=16384, at="end", losses={"english": None}),
    ]
    page = Page(render_report([write_run(tmp_path / "run", [phase("run", "english", 2, {"english": 1.0})], records)]))
    assert [row[1] for row in page.tables[0][1:]] == ["6.000", "–*", "–", "–", "–", "–"]
    losses = values(page.figures["figure-loss"]["data"][0]["y"])
    assert np.isnan(losses[0])
    assert losses[1] == 5.0


def test_a_run_without_evaluations_has_a_report_all_the_same(tmp_path):
    records = [step(1, phase="english", tokens=8192)]
    page = Page(render_report([write_run(tmp_path / "run", [phase("run", "english", 1, {"english": 1.0})], records)]))
    assert "Nothing has been evaluated yet." in page.words


def test_a_last_line_that_a_crash_tore_is_left_out(tmp_path):
    folder = write_two_phases(tmp_path / "run")
    before = Page(render_report([folder])).figures
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "st')
    assert Page(render_report([folder])).figures == before


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"kind": "step", "st', r"metrics\.jsonl.*\b3\b"),
        ("[1, 2]", "line 3 is not a record"),
        ('{"step": 1}', "line 3 is not a record"),
        ('{"kind": "step", "step": 3}', "line 3 is a record without a whole number 'tokens'"),
        ('{"kind": "step", "step": 3, "tokens": 9}', "line 3 is a step without a number 'loss'"),
        ('{"kind": "go_back", "step": 3, "phase": "a"}', "line 3 is a way back without 'phase' and two numbers"),
        ('{"kind": "evaluation", "step": 3, "tokens": 9}', "line 3 is an evaluation without 'phase'"),
        (
            '{"kind": "evaluation", "step": 3, "tokens": 9, "phase": "a", "at": "end", "sources": {"english": {}}}',
            "line 3 is an evaluation without a number 'loss'",
        ),
    ],
)
def test_a_broken_line_is_named_with_its_number(tmp_path, line, words):
    folder = write_two_phases(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    with pytest.raises(CheckpointError, match=words) as error:
        render_report([folder])
    assert "\n" not in str(error.value)


def test_records_of_other_kinds_are_passed_over(tmp_path):
    folder = write_two_phases(tmp_path / "run")
    before = Page(render_report([folder])).figures
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text('{"kind": "memory", "bytes": 5}\n' + text)
    assert Page(render_report([folder])).figures == before


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.yaml", None, "no run directory"),
        ("config.yaml", "modle: {}", "config.yaml: modle is not a setting"),
        ("lineage.json", None, "lineage.json"),
        ("lineage.json", '{"phases": 3}', "lineage.json"),
        ("metrics.jsonl", None, "holds no step and no evaluation"),
        ("metrics.jsonl", "", "holds no step and no evaluation"),
    ],
)
def test_what_is_missing_in_a_run_directory_is_said_in_one_line(tmp_path, name, content, words):
    folder = write_two_phases(tmp_path / "run")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=re.escape(words)) as error:
        render_report([folder])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (9_999, "9,999"),
        (10_000, "10.0K"),
        (819_200, "819K"),
        (999_499, "999K"),
        (999_500, "1.00M"),
        (405_334_016, "405M"),
        (9_642_249_216, "9.64B"),
        (3e11, "300B"),
        (1.2e13, "12.0T"),
    ],
)
def test_counts_read_well(count, text):
    assert short(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (372, "6 min 12 s"), (11_100, "3 h 05 min")],
)
def test_times_read_well(seconds, text):
    assert duration(seconds) == text


@given(st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), min_size=1, max_size=50), st.integers(1, 9))
def test_a_thinned_curve_has_the_means_of_its_groups(curve, group):
    points = thinned(np.array(curve), group)
    groups = [curve[start : start + group] for start in range(0, len(curve), group)]
    assert len(points) == len(groups)
    for point, members in zip(points, groups, strict=True):
        finite = [each for each in members if each == each]
        assert np.isnan(point) if not finite else point == pytest.approx(sum(finite) / len(finite), abs=1e-6)
