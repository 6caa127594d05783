"""A conversation in a model's chat template, and what of it the template leaves out.

A template writes what its author thought of and passes over the rest in silence. To see what,
the conversation is rendered once more with a word of its own in the place of each part: a word
that does not come out is a part that the model would never see. Where answers make no sense
without it the row is refused, else the part is named.

Templates disagree about the arguments of a call: most write an object with `tojson`, some add
a JSON text to a text. The object is tried first; the text is used where the template fails
on it, or writes it as Python would.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowmem.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lowmem.data.rows.messages import Message

THOUGHT = "</think>"  # ends the reasoning where it stands in the answer itself; some templates cut it off


@dataclass(frozen=True)
class Part:
    """A part of a conversation: the word in its place, what to call it, and whether an answer hangs on it."""

    word: str
    name: str
    needed: bool


class Chat:
    """A conversation that a tokenizer's chat template renders.

    Args:
        tokenizer: with a chat template.
        messages: as `read_messages` gives them.
        tools: as `read_tools` gives them.

    Raises:
        UserError: the template cannot render the tool calls.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._messages = [{key: value for key, value in m.items() if key != "train"} for m in messages]
        self._tools = [dict(tool) for tool in tools]
        self._arguments_as_text = False
        if any("tool_calls" in message for message in messages):
            self._arguments_as_text = self._wants_text()

    def ids(self, stop: int, *, ask: bool = False, another: bool = False) -> list[int]:
        """Tokens of the messages before `stop`.

        Args:
            stop: number of messages.
            ask: end where the next answer begins.
            another: put a word in the place of each thing that the last message says.

        Raises:
            UserError: the template refuses them.
        """
        messages = self._messages[:stop]
        if another:
            messages[-1] = _another(messages[-1])
        rendered = self._render(messages, self._tools, tokenize=True, return_dict=True, ask=ask)
        return list(rendered["input_ids"])

    def text(self, stop: int, *, ask: bool = False) -> str:
        """The text of the messages before `stop`; `ask` ends it where the next answer begins.

        Raises:
            UserError: the template refuses them.
        """
        return str(self._render(self._messages[:stop], self._tools, tokenize=False, ask=ask))

    def left_out(self, stop: int, answers: Collection[int]) -> list[str]:
        """Names of parts of the messages before `stop` that the template does not show.

        Args:
            stop: number of messages.
            answers: those of them whose reasoning counts in the loss; earlier reasoning may be left out.

        Raises:
            UserError: one of these parts is needed to make sense of an answer.
        """
        parts: list[Part] = []
        messages, tools = self._marked(stop, answers, parts)
        text = self._render(messages, tools, tokenize=False) if parts else ""
        missing = [part for part in parts if part.word not in text]
        for part in missing:
            if part.needed:
                raise UserError(
                    f"the chat template does not show {part.name}: "
                    "use a model whose template does, or take the row out"
                )
        return list(dict.fromkeys(part.name for part in missing))

    def _wants_text(self) -> bool:
        """Whether the template takes the arguments of a call as JSON text."""
        messages, tools = self._marked(len(self._messages), (), [])
        try:
            text = self._render(messages, tools, tokenize=False)
        except UserError:
            self._arguments_as_text = True
            try:
                self._render(messages, tools, tokenize=False)
            except UserError:
                self._arguments_as_text = False
                self._render(self._messages, self._tools, tokenize=False)  # says why
            return self._arguments_as_text
        return any(repr(arguments) in text for arguments in _arguments(messages))

    def _render(
        self, messages: list[Message], tools: list[dict[str, Any]], *, ask: bool = False, **options: Any
    ) -> Any:
        if self._arguments_as_text:
            messages = [_written(message) for message in messages]
        try:
            return self._tokenizer.apply_chat_template(
                messages, tools=list(tools) or None, add_generation_prompt=ask, **options
            )
        except Exception as error:  # a template raises whatever its author chose
            raise UserError(
                f"the chat template cannot render this row: {first_line(error)}: change it or take it out"
            ) from error

    def _marked(
        self, stop: int, answers: Collection[int], parts: list[Part]
    ) -> tuple[list[Message], list[dict[str, Any]]]:
        """Messages and tools with a word in the place of what may be left out; `parts` gets what it is."""
        numbers = itertools.count()

        def mark(name: str, needed: bool = False) -> str:
            parts.append(Part(f"zq{next(numbers)}qz", name, needed))
            return parts[-1].word

        tools: list[dict[str, Any]] = []
        for tool in self._tools:
            function = tool["function"]
            word = mark(f"the tool {function['name']!r}", True)
            tools.append({**tool, "function": {**function, "name": word}})
        messages = []
        for i, message in enumerate(self._messages[:stop]):
            copy = dict(message)
            if message["content"].strip():
                thought, close, _ = message["content"].rpartition(THOUGHT)
                before = mark(f"what stands before {THOUGHT}") + close if thought and i in answers else ""
                copy["content"] = before + mark(*_content(message))
            if "name" in message and message["role"] != "tool":
                copy["name"] = mark("name")
            if "reasoning_content" in message and i in answers:
                copy["reasoning_content"] = mark("reasoning_content")
            if "tool_calls" in message:
                copy["tool_calls"] = [_marked_call(call, mark) for call in message["tool_calls"]]
            messages.append(copy)
        return messages, tools


def _content(message: Message) -> tuple[str, bool]:
    """What to call a message's content, and whether answers hang on it."""
    if "tool_calls" in message:
        return "content beside tool_calls", False
    names = {"system": "the system message", "user": "what the user says", "tool": "the result of a tool"}
    return names.get(message["role"], "an answer"), message["role"] != "system"


def _marked_call(call: Mapping[str, Any], mark: Any) -> dict[str, Any]:
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    word = mark(f"the call of the tool {name!r}", True)
    if arguments:
        what = f"the arguments of the call of {name!r}"
        arguments = {mark(what, True): mark(what, True)}
    return {**call, "function": {"name": word, "arguments": arguments}}


def _another(message: Message) -> Message:
    """An answer of the same form that says something else."""
    words = {key: "zqz" for key in ("content", "reasoning_content") if message.get(key)}
    other = {**message, **words}
    if "tool_calls" in message:
        calls = message["tool_calls"]
        other["tool_calls"] = [{**c, "function": {"name": "zqz", "arguments": {"zqz": "zqz"}}} for c in calls]
    return other


def _arguments(messages: Sequence[Message]) -> Iterator[Any]:
    """Arguments of all calls that have some."""
    for message in messages:
        for call in message.get("tool_calls", ()):
            if call["function"]["arguments"]:
                yield call["function"]["arguments"]


def _written(message: Message) -> Message:
    """A message whose calls have their arguments as JSON text."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        text = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": text}})
    return {**message, "tool_calls": calls}
