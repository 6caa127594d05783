"""Rows become the examples that are trained on: tokens that fit, with nothing lost in silence.

TRL cuts every example at `seq_len` tokens and drops those in which no answer is left, or with
packing gives them room in which nothing is learned. Here they are counted and said before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowmem.console import Console
from lowmem.data.examples import Example, Tokens, tokenized
from lowmem.data.load import Data
from lowmem.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

LONG = 2000  # rows whose tokens are worth a bar
LARGE = 4_000_000  # characters of a row worth a word: a tokenizer takes seconds for them


@dataclass(frozen=True)
class Fitted:
    """Examples ready for training.

    Attributes:
        data: the rows they are made from.
        examples: one for each row; several where `apart`.
        answers: answers that count in the loss, at least in part; a text is one.
        beyond: answers of these rows that lie beyond `seq_len`.
        apart: whether a conversation had to become one example per answer.
    """

    data: Data
    examples: tuple[Tokens, ...]
    answers: int
    beyond: int = 0
    apart: bool = False

    def summary(self) -> str:
        """One line to say aloud."""
        answers = f"; {self.answers} answers" if self.answers > len(self.examples) else ""
        apart = f"; {len(self.examples)} examples, one per answer" if self.apart else ""
        beyond = f"; {self.beyond} more answers beyond seq_len left out" if self.beyond else ""
        return f"{self.data.summary()}{answers}{apart}{beyond}"

    def dataset(self) -> Dataset:
        """The examples as a `datasets.Dataset` of `input_ids` and `labels`, which TRL takes as they are."""
        from datasets import Dataset

        ids = [example.ids.tolist() for example in self.examples]
        return Dataset.from_dict({"input_ids": ids, "labels": [e.labels() for e in self.examples]})

    def shown(self, tokenizer: PreTrainedTokenizerBase) -> Example:
        """The first example as text."""
        return self.examples[0].shown(tokenizer)


def fitting(data: Data, tokenizer: PreTrainedTokenizerBase, seq_len: int, console: Console) -> Fitted:
    """The examples that have something to learn within `seq_len` tokens, where training cuts them.

    Args:
        data: rows as loaded.
        tokenizer: the one they are trained with.
        seq_len: tokens per example.
        console: told what is left out, and whether conversations had to be taken apart.

    Raises:
        UserError: nothing is left, or the chat template refuses a row (named with its place).
    """
    kept, examples, names = list[int](), list[Tokens](), dict[str, None]()
    apart, answers, beyond = False, 0, 0
    for i, found in enumerate(_tokenized(data, tokenizer, console)):
        fit = [example for example in found if example.answers(seq_len)]
        if fit:
            kept.append(i)
            examples += fit
            apart = apart or len(found) > 1
            answers += sum(e.answers(seq_len) for e in fit)
            beyond += sum(len(e.spans) - e.answers(seq_len) for e in found)
            names |= dict.fromkeys(name for e in fit for name in e.left_out)
    ignored = dict.fromkeys([*data.ignored, *names])
    why = f"have no answer left within seq_len {seq_len}"
    rows = kept_of(data, kept, why, console, ignored=tuple(ignored))
    fitted = Fitted(rows, tuple(examples), answers, beyond, apart)
    _say(data, fitted, tuple(names), seq_len, console)
    return fitted


def asked_within(data: Data, tokenizer: PreTrainedTokenizerBase, seq_len: int, console: Console) -> Data:
    """The rows of other tasks whose prompt leaves room for an answer within `seq_len` tokens.

    Args:
        data: rows with a `prompt`; tokenizer, seq_len, console: as for `fitting`.

    Raises:
        UserError: no row is left.
    """
    kept = [i for i, row in enumerate(data.rows) if _asked(row["prompt"], tokenizer) < seq_len]
    return kept_of(data, kept, f"have a prompt that fills seq_len {seq_len}", console)


def kept_of(data: Data, kept: Sequence[int], why: str, console: Console, **changes: Any) -> Data:
    """The rows that fit into an example; how many do not is told.

    Args:
        data: rows as loaded; kept: places of those that fit.
        why: what the others do, as in "exceed seq_len 128".
        console: told how many are left out; changes: as for `Data.only`.

    Raises:
        UserError: none fits.
    """
    lost, of = len(data.rows) - len(kept), f"{data.name} ({data.split})"
    if not kept:
        raise UserError(f"{of}: all {lost} rows {why}: raise seq_len")
    if lost:
        console.say(f"{of}: {lost} of {len(data.rows)} rows {why} and are left out: raise seq_len")
    return data.only(kept, too_long=lost, **changes)


def _asked(prompt: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a prompt."""
    if isinstance(prompt, str):
        return len(tokenizer(prompt)["input_ids"])
    try:
        rendered: Any = tokenizer.apply_chat_template(prompt, return_dict=True, add_generation_prompt=True)
    except Exception as error:  # a template raises whatever its author chose
        raise UserError(f"the chat template cannot render a prompt: {error}") from error
    return len(rendered["input_ids"])


def _tokenized(data: Data, tokenizer: PreTrainedTokenizerBase, console: Console) -> Iterator[list[Tokens]]:
    """The examples of each row; an error names the row's place."""
    if len(data.rows) >= LONG:
        console.start("tokenize", len(data.rows))
    for i, row in enumerate(data.rows):
        if (size := _characters(row)) > LARGE:
            where = data.places[i] if data.places else f"row {i + 1}"
            console.say(f"{where}: {size / 1e6:.0f} million characters in one row, this takes a while")
        try:
            found = tokenized(row, tokenizer)
        except UserError as error:
            raise UserError(f"{data.places[i]}: {error}" if data.places else str(error)) from error
        if len(data.rows) >= LONG:
            console.advance(i + 1, {})
        yield found


def _characters(row: Mapping[str, Any]) -> int:
    """Length of all that a row says."""
    said = (one for key in ("text", "prompt", "completion") for one in _pieces(row.get(key, "")))
    return sum(map(len, said))


def _pieces(value: Any) -> Iterator[str]:
    yield from [value] if isinstance(value, str) else (message["content"] for message in value)


def _say(data: Data, fitted: Fitted, names: tuple[str, ...], seq_len: int, console: Console) -> None:
    """Tell what of the rows is left out."""
    of = f"{data.name} ({data.split})"
    if fitted.beyond:
        console.say(
            f"{of}: {fitted.beyond} answers lie beyond seq_len {seq_len} and are left out: raise seq_len"
        )
    if fitted.apart:
        console.say(
            f"{of}: the chat template changes earlier turns when others follow, so each answer is an example "
            f"with all that was said before it: {len(fitted.data.rows)} rows, {len(fitted.examples)} examples"
        )
    elif fitted.answers > len(fitted.examples):
        console.say(f"{of}: {fitted.answers} answers are trained on, several in a row")
    if names:
        console.say(f"{of}: left out, since the chat template does not show it: {', '.join(names)}")
