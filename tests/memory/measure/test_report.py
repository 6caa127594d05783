"""Report pages: self-contained, small, true to their document, and drawn for every strategy and extreme."""

from __future__ import annotations

import copy
import html.parser
import itertools
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import lowmem
from lowmem.errors import UserError
from lowmem.report import page
from lowmem.report import pages as report
from lowmem.report.charts import bars, curves, maps, svg, timeline
from lowmem.report.units import format_bytes, format_ticks, nice_range
from tests.memory import documents

MANY = [f"strategy_{i}" for i in range(20)]
DOCUMENTS: dict[str, dict[str, Any]] = {
    "plan": documents.plan_document(["adamw", "galore", "mezo"]),
    "plan without budget": documents.plan_document(["adamw"], budget=None),
    "plan of twenty": documents.plan_document(MANY),
    "plan of every strategy": documents.plan_document(list(lowmem.available())),
    "plan with long names": documents.plan_document([documents.LONG, documents.LONG + "_b"], model="m" * 90),
    "tiny plan": documents.plan_document(["adamw"], scale=1e-7),
    "profile": documents.profile_document(),
    "profile with long names": documents.profile_document(documents.LONG, 1e-5, 0.2),
    "run": documents.run_document(),
    "run without memory": documents.run_document(measured=False),
    "compare": documents.compare_document(["adamw", "galore", "mezo"], failed=("galore",)),
    "compare of one": documents.compare_document(["adamw"]),
    "compare of twenty": documents.compare_document(MANY),
    "compare, all failed": documents.compare_document(["adamw", "galore"], failed=("adamw", "galore")),
}


class Page(html.parser.HTMLParser):
    """What a browser would see: links, cells with bytes, the document, unclosed tags."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.cells: list[tuple[int, str]] = []
        self.open: list[str] = []
        self.data = ""
        self._bytes = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [
            str(values[key]) for key in ("src", "href", "data", "poster", "action") if key in values
        ]
        if "data-bytes" in values:
            self.cells.append((int(str(values["data-bytes"])), ""))
        self._bytes = "data-bytes" in values
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag
        self._bytes = False

    def handle_data(self, text: str) -> None:
        if self.open and self.open[-1] == "script":
            self.data += text
        elif self._bytes:
            self.cells[-1] = (self.cells[-1][0], text)


def integers(value: Any) -> set[int]:
    if isinstance(value, dict):
        return set().union(*map(integers, value.values())) if value else set()
    if isinstance(value, list):
        return set().union(*map(integers, value)) if value else set()
    return {value} if isinstance(value, int) and not isinstance(value, bool) else set()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_page_needs_nothing_else(name: str) -> None:
    text = report.html(DOCUMENTS[name])
    found = Page(text)
    assert found.open == []
    assert found.links == []
    assert not re.search(r"(?:src|href)\s*=|url\(|@import|<link|<iframe|fetch\(", text)
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {
        "http://www.w3.org/2000/svg"
    }  # a name, not a link
    assert len(text.encode()) < 2 * 2**20
    assert "prefers-color-scheme:dark" in text


@pytest.mark.parametrize("name", DOCUMENTS)
def test_numbers_of_the_page_are_those_of_the_document(name: str) -> None:
    data = DOCUMENTS[name]
    found = Page(report.html(data))
    held = json.loads(found.data)
    assert held.keys() == data.keys()
    known = integers(data)
    differences = {a - b for a in known for b in known} if len(known) < 1500 else set()
    sums = {sum(m["bytes"].values()) for m in data.get("measured", {}).get("modules", [])}
    assert found.cells or all(run["status"] == "failed" for run in data["runs"])
    for size, words in found.cells:
        difference = words[0] in "+-0" and size in differences
        assert size in known or -size in known or size in sums or difference
        assert words in (format_bytes(size), format_bytes(size, signed=True))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_strategy_is_named_in_tables_and_pictures(name: str) -> None:
    data = DOCUMENTS[name]
    text = report.html(data)
    for entry in data.get("plans", data.get("runs", [])):
        assert entry["strategy"] in text.replace("<wbr>", "")
    for section in report.build(data).sections:
        for figure in section.figures:
            assert [w for w, _ in drawn(figure.svg)] == [svg.WIDE, svg.NARROW]
            for _, picture in drawn(figure.svg):
                assert ElementTree.fromstring(picture).attrib["aria-label"]
            assert "nan" not in figure.svg
            assert "inf" not in figure.svg


def drawn(pictures: str) -> list[tuple[float, str]]:
    """The drawings of a figure, each with its width."""
    found = [f"<svg{part}" for part in pictures.split("<svg")[1:]]
    return [(float(ElementTree.fromstring(one).attrib["viewBox"].split()[2]), one) for one in found]


def boxes(picture: str) -> list[tuple[float, float, float, float, str]]:
    """Extents of the upright texts of a picture, by the widths that its maker reckons with."""
    found = []
    for node in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text"):
        if "transform" in node.attrib:
            continue
        x, y, words = float(node.attrib["x"]), float(node.attrib["y"]), node.text or ""
        width = svg.text_width(words) * 0.9  # what the font takes at most
        left = {"start": x, "middle": x - width / 2, "end": x - width}[node.attrib["text-anchor"]]
        found.append((left, y - 10, left + width, y + 2, words))
    return found


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_label_is_cut_or_overlaps_another(name: str) -> None:
    for section in report.build(DOCUMENTS[name]).sections:
        for figure in section.figures:
            for width, picture in drawn(figure.svg):
                height = float(ElementTree.fromstring(picture).attrib["viewBox"].split()[3])
                placed = boxes(picture)
                for left, top, right, bottom, words in placed:
                    assert left >= 0, words
                    assert right <= width, words
                    assert top >= -1, words
                    assert bottom <= height, words
                for i, a in enumerate(placed):
                    for b in placed[i + 1 :]:
                        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
                        assert apart, (section.title, width, a[4], b[4])


def test_the_page_of_a_run_is_one_page_of_all_of_it() -> None:
    """Losses, answers, an example with its mask, data, memory, settings and command, each said once."""
    document = documents.run_document()
    text = report.html(document)
    for shown in (
        *("Held-out loss 2.900 to 1.900 (-34%)", "loss on general text", "3.2500", "sums acc"),
        *("A number.", "22 tokens; the loss counts the 1", "<mark>Six.</mark>", "&lt;b&gt;3 + 3&lt;/b&gt;"),
        *("rows.jsonl (train): 40 rows", "Predicted against measured", "Settings", document["command"]),
    ):
        assert text.split("<script")[0].count(shown) == 1 or shown in ("Settings", document["command"])
        assert shown in text
    assert text.split("<script")[0].count("<h2>Command") == 1
    curve = text[text.index("Losses over the steps") :].split("</svg>")[0]
    for name in ("training, smoothed", "held out", "general text"):
        assert name in curve


def test_a_comparison_shows_what_was_forgotten_where_it_was_asked() -> None:
    document = documents.compare_document(["adamw", "galore"])
    plain = report.build(document).sections[0].tables[0]
    for run, after in zip(document["runs"], (3.1, 2.95), strict=True):
        run |= {"general_before": 3.0, "general_after": after, "benchmarks": {"sums acc": 0.5}}
    table = report.build(document).sections[0].tables[0]
    assert set(table.columns) - set(plain.columns) == {"general text", "sums acc"}
    column = table.columns.index("general text")
    assert {row[column] for row in table.rows} == {"3.1000 (+0.1000)", "2.9500 (-0.0500)"}
    assert {row[column + 1] for row in table.rows} == {"0.5000"}


def test_two_curves_of_the_same_numbers_are_both_seen() -> None:
    same = [(1.0, 4.0), (2.0, 2.0), (3.0, 1.0)]
    picture = curves.curves([curves.Curve("a", same), curves.Curve("b", list(same))], ("x", "y"), "two")
    assert len(re.findall(r'class="curve h1 o1"', picture)) == 2  # wide and narrow
    assert not re.findall(r'class="curve h0 o', picture)
    apart = curves.Curve("b", [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)])  # they cross, and share no stretch
    assert " o1" not in curves.curves([curves.Curve("a", same), apart], ("x", "y"), "two")


@pytest.mark.parametrize(
    ("values", "zero", "least"),
    [((1.0, 1.01), True, 1.0), ((10.7, 10.6), False, 1.0), ((0.0, 0.0), False, 0.0)],
)
def test_noise_fills_no_picture(values: tuple[float, float], zero: bool, least: float) -> None:
    """An axis of bytes begins at zero; one of losses spans a tenth of them."""
    low, high = curves._span(values, zero)
    assert low <= min(values)
    assert high >= max(values)
    assert high - low >= least
    assert low >= 0.0


def test_one_step_names_the_optimizer_step_however_short_it_is() -> None:
    names = ("forward", "loss backward", "layers backward", "clip", "optimizer step")
    ends = (0, 400, 420, 800, 995, 999)
    phases = [{"name": n, "start": a, "stop": b} for n, a, b in zip(names, ends[:-1], ends[1:], strict=True)]
    line = {"bytes": {"weights": [5] * 1000}, "phases": phases}
    for width, picture in drawn(timeline.picture(line)):
        assert "optimizer step" in [words for *_, words in boxes(picture)], width


def test_a_run_that_learned_the_wrong_way_says_so() -> None:
    document = documents.run_document(measured=False)
    assert report.build(document).tone == "good"
    document["result"]["held_out"]["after"]["loss"] = 3.0
    assert report.build(document).tone == "warn"
    document["result"]["held_out"]["after"]["loss"] = None
    assert report.build(document).tone == "warn"
    document["result"]["nonfinite_weights"] = ["a"]
    assert report.build(document).tone == "bad"


def test_a_hostile_name_cannot_leave_its_place() -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=y>"
    text = report.html(documents.plan_document([evil], model=evil))
    assert Page(text).links == []
    assert text.count("<script") == 1
    assert json.loads(Page(text).data)["model"]["name"] == evil


def plan(**changes: Any) -> dict[str, Any]:
    data = documents.plan_document(["adamw"], budget=100 * 2**30)
    data["plans"][0] |= {"fits": True, "headroom_bytes": 20 * 2**30, "levers": []} | changes
    return data


def test_verdicts_are_true() -> None:
    assert report.build(plan()).verdict.startswith("Fits: 80.00 GiB of 100.00 GiB (20.00 GiB free).")
    assert report.build(plan()).tone == "good"
    assert report.build(plan(headroom_bytes=2**30)).tone == "warn"
    missing = report.build(plan(fits=False, headroom_bytes=-(2**30)))
    assert missing.verdict.startswith("Does not fit: misses 100.00 GiB by 1.00 GiB.")
    assert missing.tone == "bad"
    lever = plan(levers=[{"lever": "a", "saves": 0}, {"lever": "b", "saves": 3 * 2**30}])
    assert "Best lever: b, -3.00 GiB." in report.build(lever).verdict
    assert "lever" not in report.build(plan(levers=[{"lever": "a", "saves": 0}])).verdict


def test_verdict_of_several_plans_counts_those_that_fit() -> None:
    data = documents.plan_document(MANY, budget=30 * 2**30)
    fitting = [p for p in data["plans"] if p["fits"]]
    assert 0 < len(fitting) < 20
    best = max(fitting, key=lambda p: p["headroom_bytes"])
    verdict = report.build(data).verdict
    assert verdict.startswith(
        f"{len(fitting)} of 20 strategies fit into 30.00 GiB; the smallest is {best['strategy']}"
    )
    none = report.build(documents.plan_document(MANY, budget=2**30))
    assert none.verdict.startswith("None of 20 strategies fits into 1.00 GiB;")
    assert none.tone == "bad"


def test_levers_may_be_given_by_the_peak_they_lead_to() -> None:
    data = plan()
    data["plans"][0]["levers"] = [
        {"lever": "release", "peak": data["plans"][0]["peak"]["allocated"] - 2**30, "event": "x"}
    ]
    assert "Best lever: release, -1.00 GiB." in report.build(data).verdict


def test_a_lever_without_gain_is_shown() -> None:
    text = report.html(documents.plan_document(["adamw"]))
    assert text.count("gains nothing") >= 2  # picture and table
    rows = [
        {"lever": "plain AdamW", "peak": 10},
        {"lever": "free", "peak": 10},
        {"lever": "dear", "peak": 12},
    ]
    picture = bars.waterfall(rows)
    assert "10 B, gains nothing" in picture
    assert "12 B (+2 B)" in picture


def test_profile_says_when_the_prediction_is_off() -> None:
    good = documents.profile_document()
    assert report.build(good).tone == "good"
    assert "Optimizer state is as predicted to the byte." in report.build(good).verdict
    off = copy.deepcopy(good)
    off["error_percent"]["peak_allocated"] = -3.1
    assert report.build(off).tone == "warn"
    wrong = copy.deepcopy(good)
    wrong["predicted"]["state_bytes"] += 1
    assert "Optimizer state differs from the prediction." in report.build(wrong).verdict
    alone = copy.deepcopy(good) | {"predicted": None, "error_percent": {}}
    assert "nothing was predicted" in report.build(alone).verdict


def test_front_holds_what_nothing_beats() -> None:
    points = [(5.0, 1.0), (3.0, 2.0), (4.0, 2.0), (1.0, 9.0), (6.0, 1.0), (1.0, 8.0)]
    front = curves.front(points)
    assert front == [5, 1, 0]
    for i, (x, y) in enumerate(points):
        beaten = any((a <= x and b <= y) and (a, b) != (x, y) for a, b in points)
        assert (i in front) == (not beaten)


def test_comparison_names_the_ends_of_the_front_and_what_failed() -> None:
    data = documents.compare_document(["adamw", "galore", "mezo"], failed=("galore",))
    built = report.build(data)
    assert "1 of 3 failed." in built.verdict
    assert built.tone == "warn"
    assert "needs a 2-D weight, got (768,)" in report.html(data).replace("&#x27;", "'").replace("<wbr>", "")
    lost = report.build(documents.compare_document(["adamw"], failed=("adamw",)))
    assert lost.verdict == "No run finished with a finite loss. 1 of 1 failed."


def test_a_diverged_run_is_in_the_table_but_not_on_the_front() -> None:
    data = documents.compare_document(["adamw", "galore"])
    data["runs"][0] |= {"loss_after": None, "curve": [{"step": 1, "tokens": 8, "loss": None}]}
    built = report.build(data)
    assert "adamw" not in built.verdict
    assert "adamw" in report.html(data)


def test_bands_and_frontier_of_the_map() -> None:
    assert [maps.band(p, 100) for p in (90, 90.5, 97.5, 100, 101)] == [
        "ample",
        "tight",
        "thin",
        "thin",
        "over",
    ]
    grid = {"seq_lens": [128, 256, 512], "batch_sizes": [1, 2], "peak": [[1, 2], [2, 4], [4, 8]]}
    assert maps.frontier(grid, 4) == [512, 256]
    assert maps.frontier(grid, 1) == [128, None]


def test_sizes_are_binary_and_labelled() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1024, 2**20, 2**30, None)] == [
        "0 B",
        "1,023 B",
        "1.0 KiB",
        "1.0 MiB",
        "1.00 GiB",
        "-",
    ]
    assert format_bytes(-1536, signed=True) == "-1.5 KiB"
    assert format_bytes(1536, signed=True) == "+1.5 KiB"


@pytest.mark.parametrize(("low", "high"), [(0, 50.2), (0.61, 1.04), (3, 3), (0, 0), (1e-9, 2e-9), (-4, 7)])
def test_ticks_enclose_the_data_and_tell_themselves_apart(low: float, high: float) -> None:
    ticks = nice_range(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert len(set(format_ticks(ticks))) == len(ticks) >= 2


def test_labels_spread_without_overlap() -> None:
    centres = svg.spread([50.0] * 30, [17.0] * 30, 10, 300)
    assert all(b - a >= 17 - 1e-9 for a, b in itertools.pairwise(centres))
    assert svg.spread([20.0, 90.0], [10.0, 10.0], 0, 100) == [20.0, 90.0]


@pytest.mark.parametrize(
    "label", ["short", documents.LONG, "galore (rank=128, states=int8, proj_type=svd)", "x" * 100]
)
def test_wrapped_labels_lose_nothing(label: str) -> None:
    lines = svg.wrap(label, 34)
    assert all(0 < len(line) <= 34 for line in lines)
    assert "".join(lines).replace(" ", "") == label.replace(" ", "")


def test_write_is_whole_or_absent(tmp_path: Path) -> None:
    target = report.write(DOCUMENTS["plan"], tmp_path / "plan.html")
    assert target.read_text(encoding="utf-8") == report.html(DOCUMENTS["plan"])
    assert [file.name for file in tmp_path.iterdir()] == ["plan.html"]
    with pytest.raises(UserError, match="name a folder that exists"):
        report.write(DOCUMENTS["plan"], tmp_path / "missing" / "plan.html")
    with pytest.raises(UserError, match="no plan, profile, comparison or run"):
        report.build({"model": {}})


def test_cells_are_written_as_the_terminal_shows_them() -> None:
    assert [page.written(c) for c in (None, 4096, "x", page.Size(2**20), page.Percent(-0.5))] == [
        "-",
        "4,096",
        "x",
        "1.0 MiB",
        "-0.50 %",
    ]


def test_a_title_names_card_model_rows_and_dtype() -> None:
    data = documents.plan_document(["adamw"])
    data["run"] = {"batch_size": 2, "seq_len": 512, "dtype": "bfloat16"}
    data["gpu"] = {"name": "rtx4090"}
    title = report.build(data).title
    assert title == f"Memory plan: {data['model']['name']} on rtx4090, batch 2 x 512 tokens, bfloat16"


def test_retries_have_a_colour_and_a_word_of_their_own() -> None:
    data = plan(fits=False, verdict="fits with retries", headroom_bytes=-5)
    section = report.build(data).sections[0]
    assert section.tables[0].marks == ["warn"]
    assert "does not count as fitting" in section.text


def test_a_telephone_gets_its_own_drawing_and_tables_that_do_not_scroll() -> None:
    text = report.html(documents.plan_document(["adamw", "galore"], budget=100 * 2**30))
    assert "min-width:700px" not in text
    assert ".scroll>svg.wide{display:none}" in text
    for columns in re.findall(r"<table>(.*?)</thead>", text):
        assert columns.count("<th") <= 3
