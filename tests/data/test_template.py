"""A template that does not teach to stop is warned about; rows that no tokenizer takes are named."""

import json
from types import SimpleNamespace

import pytest

from lowmem.console import Console
from lowmem.data.load import load_data
from lowmem.data.rows.template import check_template, never_ends
from lowmem.errors import UserError

OPEN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
CLOSED = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token + '\n' }}{% endfor %}"
ASKED_ONLY = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{% if m['role'] == 'user' %}{{ eos_token }}{% endif %}{% endfor %}"
)
REFUSING = "{{ raise_exception('never') }}"


class Heard(Console):
    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


@pytest.mark.parametrize(
    ("template", "ends"), [(OPEN, True), (CLOSED, False), (ASKED_ONLY, True), (REFUSING, False)]
)
def test_whether_an_answer_ends(tokenizer, template, ends):
    tokenizer.chat_template = template
    assert never_ends(tokenizer, {256}) is ends
    assert never_ends(tokenizer, {300}) is (template is not REFUSING)


GENERATION = SimpleNamespace(eos_token_id=(255, 256))
MODEL = SimpleNamespace(generation_config=GENERATION, config=SimpleNamespace(eos_token_id=None))


def test_it_is_said(tokenizer):
    heard = Heard()
    check_template(MODEL, tokenizer, heard)  # ChatML with its own end of text
    assert heard.said == ["the tokenizer has no chat template: ChatML is used, and saved with it"]
    tokenizer.chat_template = OPEN
    check_template(MODEL, tokenizer, heard)
    assert "never ends an answer with" in heard.said[1]
    assert "</s>" in heard.said[1]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "before \ud83d after"},
        {"question": "What?", "answer": "\udc00"},
        {"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "x"}]},
    ],
)
def test_half_a_character_names_its_row(tmp_path, row):
    whole = json.loads(
        json.dumps(row).replace("\\ud83d", "a").replace("\\udc00", "a").replace("\\ud800", "a")
    )
    (tmp_path / "a.jsonl").write_text(json.dumps(whole) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"a.jsonl, line 2: .* holds half a character"):
        load_data(str(tmp_path / "a.jsonl"))


def test_a_template_that_cannot_be_read_is_blamed_itself(tokenizer):
    tokenizer.chat_template = OPEN + "\n{% if %}"
    with pytest.raises(
        UserError, match=r"the chat template of the tokenizer is broken in its line 3: .*: mend it"
    ):
        check_template(SimpleNamespace(), tokenizer, Heard())
    tokenizer.chat_template = REFUSING
    check_template(SimpleNamespace(generation_config=None, config=None), tokenizer, Heard())
