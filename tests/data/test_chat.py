"""What chat templates make of a conversation: one example or one per answer, parts refused or named."""

import json

import pytest

from lowmem.console import Console
from lowmem.data.examples import ensure_chat_template, render_example, tokenized
from lowmem.data.fitting import fitting
from lowmem.data.load import load_data, to_prompt_completion
from lowmem.errors import UserError
from tests.data import templates

ASK = {"role": "user", "content": "2+2?"}
SAY = {"role": "assistant", "content": "4"}
TOOL = {"type": "function", "function": {"name": "weather"}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Nairobi"}}}
CALLS = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "18 C"},
    {"role": "assistant", "content": "It is 18 C."},
]


class Heard(Console):
    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


def file_of(folder, rows):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def shown(tokenizer, template, messages, **fields):
    tokenizer.chat_template = template
    (row,) = to_prompt_completion({"messages": messages, **fields})
    return [example.shown(tokenizer).marked() for example in tokenized(row, tokenizer)]


def with_text(text):
    return [CALLS[0], {**CALLS[1], "content": text}, *CALLS[2:]]


@pytest.mark.parametrize("template", [templates.PLAIN, templates.STRICT, None])
def test_all_answers_of_a_conversation_in_one_example(tokenizer, template):
    tokenizer.chat_template = template
    ensure_chat_template(tokenizer)
    (text,) = shown(tokenizer, tokenizer.chat_template, [ASK, SAY] * 30)
    assert text.count("[[4</s>") == text.count("2+2?") == 30
    assert "[[4" not in text.replace("[[4</s>", "")


def test_a_token_over_the_end_of_a_turn_is_never_cut(tokenizer):
    """Where tokens of two turns merge, an answer is not the beginning of the whole in tokens."""
    merged = json.loads(tokenizer.backend_tokenizer.to_str())
    merged["pre_tokenizer"] = {**merged["pre_tokenizer"], "use_regex": False}
    merged["model"]["vocab"]["4u"] = 257
    merged["model"]["merges"] = [["4", "u"]]
    tokenizer._tokenizer = tokenizer.backend_tokenizer.from_str(json.dumps(merged))
    bare = "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}"
    bare += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    first, second = shown(tokenizer, bare, [ASK, SAY, ASK, SAY])
    assert first == "user:2+2?assistant:[[4]]"
    assert second == "user:2+2?assistant:4user:2+2?assistant:[[4]]"


def test_answers_switched_off_are_not_marked(tokenizer):
    bad = {"role": "assistant", "content": "5", "weight": 0}
    (text,) = shown(tokenizer, templates.PLAIN, [ASK, bad, ASK, SAY, ASK, bad, ASK, SAY])
    turn, wrong, right = "<|user|>2+2?</s><|assistant|>", "5</s>", "[[4</s>]]"
    assert text == turn + wrong + turn + right + turn + wrong + turn + right


@pytest.mark.parametrize("template", [templates.THINKING, templates.ENDED])
def test_one_example_per_answer_where_earlier_turns_change(tokenizer, template, tmp_path):
    tokenizer.chat_template = template
    data = load_data(file_of(tmp_path, [{"messages": [ASK, SAY] * 3}] * 2))
    heard = Heard()
    fitted = fitting(data, tokenizer, 512, heard)
    assert len(fitted.examples) == 6
    assert len(fitted.data.rows) == 2
    for example in fitted.examples:
        (part,) = [text for text, counts in example.shown(tokenizer).parts() if counts]
        assert part in ("<think></think>4</s>", "4</s><end>")
    assert "each answer is an example" in heard.said[0]
    assert "2 rows, 6 examples" in heard.said[0]
    assert fitted.summary().endswith("; 6 examples, one per answer")


def test_reasoning_is_trained_where_the_template_shows_it(tokenizer):
    said = {**SAY, "reasoning_content": "Two and two."}
    first, second = shown(tokenizer, templates.THINKING, [ASK, said, ASK, said])
    assert first == "<|user|>2+2?</s><|assistant|>[[<think>Two and two.</think>4</s>]]"
    assert second.endswith("4</s><|user|>2+2?</s><|assistant|>[[<think>Two and two.</think>4</s>]]")


@pytest.mark.parametrize(
    ("template", "message", "name"),
    [
        (templates.PLAIN, {**SAY, "reasoning_content": "Two and two."}, "reasoning_content"),
        (templates.THOUGHTLESS, {**SAY, "content": "<think>Two.</think>4"}, "what stands before </think>"),
        (templates.CALL_ALONE, {**CALLS[1], "content": "Let me look."}, "content beside tool_calls"),
        (templates.PLAIN, {**SAY, "name": "Ada"}, "name"),
    ],
)
def test_what_the_template_leaves_out_is_named(tokenizer, tmp_path, template, message, name):
    tokenizer.chat_template = template
    heard = Heard()
    fitted = fitting(load_data(file_of(tmp_path, [{"messages": [ASK, message]}])), tokenizer, 512, heard)
    (said,) = heard.said
    assert said.endswith(f"left out, since the chat template does not show it: {name}")
    assert fitted.summary().endswith(f"; ignored fields: {name}")


def test_a_system_message_left_out_is_named(tokenizer, tmp_path):
    tokenizer.chat_template = templates.NO_SYSTEM
    heard = Heard()
    row = {"messages": [{"role": "developer", "content": "Be brief."}, ASK, SAY]}
    fitting(load_data(file_of(tmp_path, [row])), tokenizer, 512, heard)
    assert heard.said[0].endswith("does not show it: the system message")


def test_what_the_template_shows_is_not_named(tokenizer, tmp_path):
    tokenizer.chat_template = templates.CALLING
    heard = Heard()
    row = {"messages": with_text("Let me look."), "tools": [TOOL], "system": "Be brief."}
    fitted = fitting(load_data(file_of(tmp_path, [row])), tokenizer, 512, heard)
    assert [text.partition("): ")[2] for text in heard.said] == ["2 answers are trained on, several in a row"]
    assert "ignored" not in fitted.summary()


CALLED = '<call>weather {"city": "Nairobi"}'


@pytest.mark.parametrize(
    ("template", "called"),
    [
        (templates.CALLING, CALLED),
        (templates.CALL_TEXT, CALLED),
        (templates.CALL_AS_IS, CALLED),
        (templates.CALL_ALONE, '{"name": "weather", "arguments": {"city": "Nairobi"}}'),
    ],
)
def test_calls_are_rendered_and_trained(tokenizer, template, called):
    (text,) = shown(tokenizer, template, CALLS, tools=[TOOL])
    assert text == (
        json.dumps(TOOL) + f"<|user|>Weather?</s><|assistant|>[[{called}</s>]]"
        "<|tool|>18 C</s><|assistant|>[[It is 18 C.</s>]]"
    )


def test_a_call_switched_off_is_context(tokenizer):
    messages = [CALLS[0], {**CALLS[1], "train": False}, *CALLS[2:]]
    (text,) = shown(tokenizer, templates.CALLING, messages, tools=[TOOL])
    assert text.count("[[") == 1
    assert text.endswith(CALLED + "</s><|tool|>18 C</s><|assistant|>[[It is 18 C.</s>]]")


TWO = {"role": "assistant", "content": "", "tool_calls": [CALL, {**CALL, "function": {"name": "time"}}]}


@pytest.mark.parametrize(
    ("template", "messages", "fields", "words"),
    [
        (None, CALLS, {}, "does not show the call of the tool 'weather'"),
        (templates.PLAIN, CALLS, {"tools": [TOOL]}, "does not show the tool 'weather'"),
        (templates.PLAIN, [ASK, SAY], {"tools": [TOOL]}, "does not show the tool 'weather'"),
        (templates.PLAIN, [ASK, SAY, *CALLS], {}, "does not show the call of the tool 'weather'"),
        (templates.FIRST_CALL, [ASK, TWO], {}, "does not show the call of the tool 'time'"),
        (templates.CALL_ALONE, [ASK, TWO], {}, "cannot render this row: single tool-calls only"),
        (
            templates.CALLING.replace("{{ c['function']['arguments'] | tojson }}", ""),
            CALLS,
            {},
            "the arguments of",
        ),
        (templates.NO_RESULTS, CALLS, {}, "does not show the result of a tool"),
        (templates.STRICT, [ASK, ASK, SAY], {}, "cannot render this row: roles must alternate"),
        (
            templates.STRICT,
            [{"role": "developer", "content": "x"}, ASK, SAY],
            {},
            "System role not supported",
        ),
        (templates.STRICT, CALLS, {}, "roles must alternate"),
    ],
)
def test_what_the_template_cannot_is_refused_with_the_place(
    tokenizer, tmp_path, template, messages, fields, words
):
    tokenizer.chat_template = template
    ensure_chat_template(tokenizer)
    data = load_data(file_of(tmp_path, [{"messages": [ASK, SAY]}, {"messages": messages, **fields}]))
    with pytest.raises(UserError) as caught:
        fitting(data, tokenizer, 512, Console())
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{data.name}, line 2: the chat template ")
    assert "take " in str(caught.value)


def test_a_template_that_shows_no_text_is_refused(tokenizer):
    with pytest.raises(UserError, match="does not show what the user says: use a model whose template does"):
        shown(tokenizer, templates.PARTS, [ASK, SAY])


def test_nothing_but_the_answer_is_trained_where_it_changes_earlier_turns(tokenizer):
    call, answer = shown(tokenizer, templates.LOOKING_AHEAD, with_text("Let me look."))
    assert call.startswith("<|user|>Weather?</s><|assistant|>[[Let me look.{")
    assert answer.endswith("<|tool|>18 C</s><|assistant|>[[It is 18 C.</s>]]")
    assert answer.count("[[") == 1


def test_the_last_word_is_an_answer(tokenizer):
    (row,) = to_prompt_completion({"messages": [ASK, SAY, {"role": "user", "content": "Thanks!"}]})
    tokenizer.chat_template = templates.PLAIN
    assert render_example(row, tokenizer).marked() == "<|user|>2+2?</s><|assistant|>[[4</s>]]"


def test_answers_beyond_seq_len_are_counted(tokenizer, tmp_path):
    tokenizer.chat_template = templates.PLAIN
    long = {"role": "user", "content": "?" * 100}
    rows = [
        {"messages": [ASK, SAY, long, SAY, ASK, SAY]},
        {"messages": [ASK, SAY]},
        {"messages": [long, SAY]},
    ]
    heard = Heard()
    fitted = fitting(load_data(file_of(tmp_path, rows)), tokenizer, 64, heard)
    assert [example.answers(64) for example in fitted.examples] == [1, 1]
    assert "1 of 3 rows have no answer left" in heard.said[0]
    assert "2 answers lie beyond seq_len 64 and are left out" in heard.said[1]
    assert "; 2 more answers beyond seq_len left out" in fitted.summary()
