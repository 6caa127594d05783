"""What the model will see of a row, and which of its tokens count in the loss.

The tokens are those of TRL: the chat template renders prompt and completion together, the
loss starts where the rendered prompt alone ends. Tokenizers of base models have no chat
template; `ensure_chat_template` gives them ChatML with their own end-of-text token at the
end of each turn, so that generation stops after an answer and no token is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from lowmem.errors import UserError

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
        UserError: the tokenizer has no end-of-text token to end a turn with.
    """
    if tokenizer.chat_template:
        return False
    if not tokenizer.eos_token:
        raise UserError("the tokenizer has neither a chat template nor an end-of-text token: set one of them")
    starts_with_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    tokenizer.chat_template = _CHATML.format(bos="{{ bos_token }}" if starts_with_bos else "")
    return True


def answer_fits(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, limit: int) -> bool:
    """Whether a token that counts in the loss stands among a row's first `limit` tokens.

    Args:
        row: as for `render_example`.
        tokenizer: as for `render_example`.
        limit: tokens that training keeps of a row.

    Raises:
        UserError: as `render_example`.
    """
    if "text" in row:
        return True  # the loss counts from the first token on
    whole = _whole(row, tokenizer)
    return len(whole) <= limit or _masked(row, tokenizer, whole) < limit


def render_example(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Example:
    """Render a row of `Data.rows` as training will, with its loss mask.

    Args:
        row: `text`, or `prompt` and `completion` (texts, or messages).
        tokenizer: with a chat template where the row holds messages (see `ensure_chat_template`).

    Raises:
        UserError: messages without a template, or a template that refuses them.

    Example:
        >>> render_example({"prompt": "2 + 2 =", "completion": " 4"}, tokenizer).marked()
        '2 + 2 =[[ 4</s>]]'
    """
    if "text" in row:
        ids = _ids(tokenizer, _with_eos(row["text"], tokenizer))
        return _example(tokenizer, [], ids)
    whole = _whole(row, tokenizer)
    masked = _masked(row, tokenizer, whole)
    return _example(tokenizer, whole[:masked], whole[masked:])


def _whole(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of prompt and completion together."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        return _ids(tokenizer, prompt + _with_eos(completion, tokenizer))
    return _ids(tokenizer, [*prompt, *completion])


def _masked(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, whole: list[int]) -> int:
    """How many of the tokens belong to the prompt."""
    alone = _ids(tokenizer, row["prompt"], ask=True)
    # not len(alone): a template may render the prompt differently when an answer follows
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(alone, whole, strict=False))))


def _with_eos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    eos = tokenizer.eos_token or ""
    return text if text.endswith(eos) else text + eos


def _ids(tokenizer: PreTrainedTokenizerBase, content: Any, *, ask: bool = False) -> list[int]:
    """Tokens of a text or of messages; `ask` ends them where the answer begins."""
    if isinstance(content, str):
        return list(tokenizer(content)["input_ids"])
    try:
        rendered: Any = tokenizer.apply_chat_template(
            content, tokenize=True, return_dict=True, add_generation_prompt=ask
        )
    except Exception as error:  # a template raises whatever its author chose
        raise UserError(f"the chat template cannot render this row: {error}") from error
    return list(rendered["input_ids"])


def _example(tokenizer: PreTrainedTokenizerBase, masked: list[int], trained: list[int]) -> Example:
    before, after = str(tokenizer.decode(masked)), str(tokenizer.decode(trained))
    spans = ((len(before), len(before) + len(after)),) if after else ()
    return Example(before + after, spans, len(masked) + len(trained), len(trained))
