"""The demo data is what its card says: counts, hashes, split, and no known defect."""

import hashlib
import importlib.util
import json
import re
from importlib import resources
from pathlib import Path

import pytest

from lowmem.data.load import load_data, splits

ROOT = Path(str(resources.files("lowmem.configs"))) / "data"
FILES = ("train", "validation", "heldout", "heldout_reserved")
FIELDS = {
    "capital",
    "location",
    "area",
    "borders",
    "currency",
    "language",
    "nationality",
    "domain",
    "peak",
    "size",
}


def rows(name):
    return [json.loads(line) for line in (ROOT / "factbook" / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_factbook", ROOT / "make_factbook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", FILES)
def test_card_states_counts_and_hash(name):
    data = (ROOT / "factbook" / f"{name}.jsonl").read_bytes()
    found = rows(name)
    line = (
        f"| `factbook/{name}.jsonl` | {len(found):,} | {len({r['country'] for r in found})} "
        f"| `{hashlib.sha256(data).hexdigest()}` |"
    )
    assert line in (ROOT / "README.md").read_text()


def test_counts():
    assert [len(rows(name)) for name in FILES] == [1558, 116, 190, 190]
    assert splits("factbook") == tuple(sorted(FILES))
    assert [len(load_data("factbook", split=name).rows) for name in FILES] == [1558, 116, 190, 190]


def test_no_country_is_in_two_splits():
    parts = [{r["country"] for r in rows(name)} for name in FILES[:3]]
    assert [len(part) for part in parts] == [164, 12, 20]
    assert len(set.union(*parts)) == 196
    assert {r["country"] for r in rows("heldout_reserved")} == parts[2]


def test_reserved_phrasings_are_never_trained_on(script):
    patterns = [re.escape(script.QUESTIONS[field][2]).replace(r"\{c\}", ".+") for field in FIELDS]
    asked = [r["prompt"][0]["content"] for name in FILES[:3] for r in rows(name)]
    assert set(script.QUESTIONS) == FIELDS == {r["field"] for r in rows("train")}
    assert not [q for q in asked if any(re.fullmatch(p, q) for p in patterns)]
    kept = [r["prompt"][0]["content"] for r in rows("heldout_reserved")]
    assert all(any(re.fullmatch(p, q) for p in patterns) for q in kept)
    answers = {r["completion"][0]["content"] for r in rows("heldout")}
    assert answers == {r["completion"][0]["content"] for r in rows("heldout_reserved")}


def test_rows_are_one_question_and_one_sentence():
    for row in (r for name in FILES for r in rows(name)):
        ask, say = row["prompt"], row["completion"]
        assert [m["role"] for m in ask + say] == ["user", "assistant"]
        assert ask[0]["content"][-1] in "?."
        assert say[0]["content"][0].isupper()
        assert say[0]["content"].endswith(".")
        assert "{" not in ask[0]["content"] + say[0]["content"]


@pytest.mark.parametrize(
    "defect",
    [
        r"\bin (Middle East|Caribbean|Netherlands|Philippines|Bahamas)",
        r"\b(of|in|from|borders|and|,) (Democratic Republic of|Republic of the Congo|Czech Republic|United)",
        r"\bthe the\b",
        r"\+\+|\best\.|; note|\bnote -|\(|\)",
        r"\bDRC\b|The Dominican\b(?! Republic)",
        r"\ba [AEIO][a-z]+an\b",
        r"\bnone\b|null|None|nan\b",
        r"(\b\w+); the adjective is \1\.",
        r"  |<|&\w+;",
    ],
)
def test_known_defects_are_gone(defect):
    texts = [r["completion"][0]["content"] for name in FILES for r in rows(name)]
    texts = [re.sub(r" \([A-Z]{3}\)", "", text) for text in texts]
    assert [text for text in texts if re.search(defect, text)] == []


def country(**fields):
    """A country as the source nests it."""
    return {
        "Government": {
            "Country name": {"conventional short form": {"text": fields.pop("name", "Kenya")}},
            "Independence": {"text": fields.pop("independence", "12 December 1963")},
        }
    }


@pytest.mark.parametrize(
    ("field", "text", "sentence"),
    [
        ("capital", "Kyiv (Kiev)", "The capital of Kenya is Kyiv."),
        (
            "capital",
            "Porto-Novo (official capital); note - Cotonou (x)",
            "The capital of Kenya is Porto-Novo.",
        ),
        ("capital", "A (first capital); B (second capital)", "The capitals of Kenya are A and B."),
        ("location", "Middle East, island in X; note - y", "Kenya is in the Middle East, an island in X."),
        ("location", "archipelago in X", "Kenya is an archipelago in X."),
        ("area", "442.6 sq km (A 280 sq km)", "The total area of Kenya is 442.6 square kilometers."),
        ("borders", "US 10 km (a (b)), DRC 2 km", "Kenya borders the United States and DRC."),
        ("currency", "leke (ALL) per US dollar - ++ 105.48", "People in Kenya pay in leke (ALL)."),
        ("currency", "the US dollar is used", "People in Kenya pay in US dollars (USD)."),
        ("language", "A (official) 76%, B 3% (official), C (official in x)", "are A and B."),
        ("language", "Kikuyu 20%, Luo", ""),
        ("nationality", "Dane(s)", "A person from Kenya is called a Dane."),
        (
            "nationality",
            "Irishman(men), Irishwoman(women), Irish (collective plural)",
            "an Irishman or an Irish",
        ),
        ("domain", "metropolitan France - .fr; x - .gf", "The Internet country code of Kenya is .fr."),
        ("peak", "Fako 4,095 m (on a mountain)", "The highest point in Kenya is Fako, at 4,095 meters."),
        ("peak", "unnamed elevation 53 m", ""),
        (
            "size",
            "almost six time the size of Virginia; x",
            "Kenya is almost six times the size of Virginia.",
        ),
    ],
)
def test_sentences(script, field, text, sentence):
    said = script.SENTENCES[field](text, "Kenya")
    assert sentence in said
    assert bool(said) == bool(sentence)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "Kenya"),
        ({"name": "DRC"}, "Democratic Republic of the Congo"),
        ({"independence": "none (territory of the US)"}, ""),
        ({"independence": ""}, ""),
    ],
)
def test_which_countries(script, fields, name):
    assert script.country_name(country(**fields)) == name
