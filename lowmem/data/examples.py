"""What the model will see of a row, and which of its tokens count in the loss.

The chat template renders prompt and completion together; the loss starts where the prompt
alone, rendered up to where the answer begins, differs from it, as in TRL. Tokenizers of
base models have no chat template; `ensure_chat_template` gives them ChatML with their own
end-of-text token at the end of each turn, so that generation stops after an answer and no
token is added.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise, takewhile
from typing import TYPE_CHECKING, Any

from lowmem.data.rows.chat import Chat
from lowmem.data.rows.messages import trained
from lowmem.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHATML = (
    "{bos}{{% for message in messages %}}"
    "{{{{ '<|im_start|>' + message['role'] + '\n' }}}}"
    "{{% if message['role'] == 'assistant' %}}"
    "{{% generation %}}{{{{ message['content'] + eos_token }}}}{{% endgeneration %}}"
    "{{% else %}}{{{{ message['content'] + eos_token }}}}{{% endif %}}"
    "{{{{ '\n' }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}"
)


@dataclass(frozen=True)
class Tokens:
    """One example as training takes it.

    Attributes:
        ids: its tokens.
        spans: (start, stop) of tokens that count in the loss, one for each answer.
        left_out: parts of the row that the chat template does not show.
    """

    ids: array[int]
    spans: tuple[tuple[int, int], ...]
    left_out: tuple[str, ...] = ()

    def labels(self) -> list[int]:
        """The tokens that count in the loss, -100 in the place of the others."""
        labels = [-100] * len(self.ids)
        for start, stop in self.spans:
            labels[start:stop] = self.ids[start:stop]
        return labels

    def answers(self, limit: int) -> int:
        """How many answers begin among the first `limit` tokens."""
        return sum(start < limit for start, _ in self.spans)

    def shown(self, tokenizer: PreTrainedTokenizerBase) -> Example:
        """The example as text."""
        text, spans, end = "", [], 0
        for start, stop in self.spans:
            text += str(tokenizer.decode(self.ids[end:start].tolist()))
            answer = str(tokenizer.decode(self.ids[start:stop].tolist()))
            spans += [(len(text), len(text) + len(answer))] if answer else []
            text, end = text + answer, stop
        text += str(tokenizer.decode(self.ids[end:].tolist()))
        trained = sum(stop - start for start, stop in self.spans)
        return Example(text, tuple(spans), len(self.ids), trained)


@dataclass(frozen=True)
class Example:
    """One rendered row.

    Attributes:
        text: all of it, special tokens included.
        spans: (start, stop) of `text`, the parts whose tokens count in the loss.
        tokens: number of tokens.
        trained: how many of them count in the loss.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    tokens: int
    trained: int

    def parts(self) -> list[tuple[str, bool]]:
        """The text in pieces, each with whether it counts in the loss."""
        pieces, end = [], 0
        for start, stop in self.spans:
            pieces += [(self.text[end:start], False), (self.text[start:stop], True)]
            end = stop
        return [(text, counts) for text, counts in [*pieces, (self.text[end:], False)] if text]

    def __str__(self) -> str:
        """The marked text in one line."""
        return " ".join(self.marked().split())

    def marked(self, before: str = "[[", after: str = "]]") -> str:
        """The text with marks around what counts in the loss."""
        return "".join(f"{before}{text}{after}" if counts else text for text, counts in self.parts())


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give a tokenizer without a chat template ChatML; say whether it was needed.

    Raises:
        UserError: the tokenizer has no end-of-text token to end a turn with, or a template that is none.
    """
    if tokenizer.chat_template:
        _refuse_broken(tokenizer)
        return False
    if not tokenizer.eos_token:
        raise UserError("the tokenizer has neither a chat template nor an end-of-text token: set one of them")
    starts_with_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    tokenizer.chat_template = _CHATML.format(bos="{{ bos_token }}" if starts_with_bos else "")
    return True


def _refuse_broken(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a template that cannot be read, before a row is blamed for it."""
    from jinja2 import TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise UserError(
            f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} is broken in its line "
            f"{error.lineno}: {first_line(error)}: mend it in chat_template.jinja or tokenizer_config.json"
        ) from error
    except Exception:  # it may refuse so short a conversation: rows will say what it makes of them
        return


def tokenized(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    """A row of `Data.rows` as tokens, with its loss mask.

    A conversation is one example with all its answers where the chat template renders every
    beginning of it as the beginning of the whole, so that the loss is that of one example per
    answer. Else (a template may drop the reasoning of earlier turns) it is one example per answer.

    Args:
        row: `text`, or `prompt` and `completion` (texts, or messages, then maybe `tools`).
        tokenizer: with a chat template where the row holds messages (see `ensure_chat_template`).

    Raises:
        UserError: messages without a template, or a template that refuses them or what they need.
    """
    if "text" in row:
        ids = _ids(tokenizer, _with_eos(row["text"], tokenizer))
        return [Tokens(array("i", ids), ((0, len(ids)),))]
    if not isinstance(row["prompt"], str):
        return _conversation(row, tokenizer)
    ids = _ids(tokenizer, row["prompt"] + _with_eos(row["completion"], tokenizer))
    start = common(_ids(tokenizer, row["prompt"]), ids)
    return [Tokens(array("i", ids), ((start, len(ids)),))]


def render_example(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Example:
    """Render a row of `Data.rows` as training will, with its loss mask; of several examples the first.

    Args:
        row: as for `tokenized`.
        tokenizer: as for `tokenized`.

    Raises:
        UserError: as `tokenized`.

    Example:
        >>> render_example({"prompt": "2 + 2 =", "completion": " 4"}, tokenizer).marked()
        '2 + 2 =[[ 4</s>]]'
    """
    return tokenized(row, tokenizer)[0].shown(tokenizer)


def _conversation(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    """One example with all answers, or one for each."""
    messages = [*row["prompt"], *row["completion"]]
    chat = Chat(tokenizer, messages, row.get("tools") or ())
    answers = [i for i in range(len(row["prompt"]), len(messages)) if trained(messages[i])]
    end = answers[-1] + 1
    if len(answers) > 1 and (found := _at_once(chat, answers, tokenizer)):
        return [Tokens(*found, tuple(chat.left_out(end, answers)))]
    spans, parts = [], []
    for i in answers:
        ids = chat.ids(i + 1)
        start = _answer_start(chat, i, ids)
        if start == len(ids):
            raise UserError(
                "the chat template does not show an answer: use another model or take the row out"
            )
        spans.append((start, len(ids)))
        parts.append(array("i", ids))
    whole = parts[-1]
    if all(part == whole[: len(part)] for part in parts):
        return [Tokens(whole, tuple(spans), tuple(chat.left_out(end, answers)))]
    return [
        Tokens(part, (span,), tuple(chat.left_out(i + 1, (i,))))
        for i, part, span in zip(answers, parts, spans, strict=True)
    ]


def _at_once(
    chat: Chat, answers: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[array[int], tuple[tuple[int, int], ...]] | None:
    """Tokens and spans of all answers from the pieces between them; None where the pieces do not join.

    The same as from the tokens of each beginning, which cost their square: a conversation of 30 answers
    would be read 60 times.
    """
    whole, cuts = chat.text(answers[-1] + 1), [0]
    for i in answers:
        asked, part = chat.text(i, ask=True), chat.text(i + 1)
        if not (whole.startswith(part) and part.startswith(asked) and cuts[-1] < len(asked) < len(part)):
            return None
        cuts += [len(asked), len(part)]
    pieces = [tokenizer(whole[a:b], add_special_tokens=False)["input_ids"] for a, b in pairwise(cuts)]
    ids = chat.ids(answers[-1] + 1)
    if list(chain(*pieces)) != ids:
        return None  # a token reaches over a cut
    ends = list(accumulate(map(len, pieces)))
    return array("i", ids), tuple(zip(ends[::2], ends[1::2], strict=True))


def _answer_start(chat: Chat, i: int, ids: Sequence[int]) -> int:
    """Where in the tokens of the messages up to an answer the model takes over.

    That is where the tokens of the prompt, up to where the answer begins, end or differ. Where they
    differ before the generation prompt, since an earlier turn changes with the answer, it is the
    generation prompt that comes last before what differs from another answer.
    """
    asked = chat.ids(i, ask=True)
    start = common(asked, ids)
    if start == len(asked) or start >= (turn := common(asked, chat.ids(i))):
        return start
    latest, ask = common(chat.ids(i + 1, another=True), ids), asked[turn:]
    for end in range(latest, len(ask) - 1, -1):
        if ids[end - len(ask) : end] == ask:
            return end
    return latest


def common(ids: Sequence[int], others: Sequence[int]) -> int:
    """Number of tokens with which both begin.

    Not the length of a prompt: a template may render it differently when an answer follows.
    """
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(ids, others, strict=False))))


def _with_eos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    eos = tokenizer.eos_token or ""
    return text if text.endswith(eos) else text + eos


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])
