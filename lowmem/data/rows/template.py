"""The chat template of a model: one where there is none, and a word where it does not teach to stop."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from lowmem.console import Console
from lowmem.data.examples import ensure_chat_template
from lowmem.models.talk import stops

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_template(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    """Make sure that messages can be rendered; plain text needs no template, and gets none.

    Args:
        model: its settings say where generation stops.
        tokenizer: gets ChatML where it has no chat template.
        console: told about either.

    Raises:
        UserError: as `ensure_chat_template`.
    """
    if ensure_chat_template(tokenizer):
        console.say("the tokenizer has no chat template: ChatML is used, and saved with it")
    ends = stops(model, tokenizer)
    if never_ends(tokenizer, ends):
        names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(sorted(ends)))) or "an end-of-text token"
        console.say(
            f"the chat template never ends an answer with {names}: the model will not learn to stop; "
            f"let the template write eos_token after each answer"
        )


def never_ends(tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> bool:
    """Whether the chat template ends an answer with none of these tokens.

    A model trained so has not learned to stop. False where the template refuses so short a
    conversation: the rows will say why.

    Args:
        tokenizer: with a chat template.
        ends: as `stops` finds them.
    """
    asked = [{"role": "user", "content": "a"}]
    try:
        before = _ids(tokenizer, asked, add_generation_prompt=True)
        whole = _ids(tokenizer, [*asked, {"role": "assistant", "content": "b"}])
    except Exception:  # a template raises whatever its author chose
        return False
    return not set(whole[len(before) :]) & set(ends)


def _ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any) -> list[int]:
    rendered: Mapping[str, Any] = tokenizer.apply_chat_template(messages, return_dict=True, **options)  # type: ignore[assignment]
    return list(rendered["input_ids"])
