"""The numbers of a step, brought to a device by one copy.

Step sizes, decay and the keys of random streams are new at every step: a few words for
each tensor. Sent one by one, each costs as much of the host's time as a kernel. What
is asked for at one step is asked for at the next one with other values: a parcel
remembers how they are made (`Recipe`), and when the next step first asks for anything,
makes them all and sends them together. They are found by what they are made of, so a
wrong guess, such as a learning rate changed in the middle of a step, is only sent late.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor

ALIGNED = 4
"""Words: generated code copies what does not begin at a multiple of 16 bytes."""

Contents = tuple[Hashable, ...]
Words = Callable[[Contents], tuple[int, ...]]


class Parcel:
    """What is sent to one device.

    Args:
        device: where to.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._step = -1
        self._sent: dict[Contents, Tensor] = {}
        self._asked: dict[Hashable, tuple[Callable[[], Contents], Words]] = {}

    def __call__(
        self, step: int, contents: Contents, words: Words, name: Hashable, again: Callable[[], Contents]
    ) -> Tensor:
        """Words on the device, 1-D int32; not to be written to.

        Args:
            step: at which they are asked for; contents: what they are made of, `words` makes them.
            name: the same at every step; again: what the contents will be when it is asked the next time.
        """
        if step != self._step:
            foreseen = [(contents(), make) for contents, make in self._asked.values()]
            self._step, self._sent, self._asked = step, self._packed(dict(foreseen).items()), {}
        self._asked[name] = (again, words)
        if contents not in self._sent:
            self._sent |= self._packed([(contents, words)])
        return self._sent[contents]

    def _packed(self, entries: Iterable[tuple[Contents, Words]]) -> dict[Contents, Tensor]:
        """Send entries together; views of what was sent."""
        packed: list[int] = []
        places: dict[Contents, tuple[int, int]] = {}
        for contents, make in entries:
            words = make(contents)
            places[contents] = (len(packed), len(packed) + len(words))
            packed += [*words, *[0] * (-len(words) % ALIGNED)]
        if not packed:
            return {}
        there = self._sent_over(torch.tensor(packed, dtype=torch.int32))
        return {contents: there[a:b] for contents, (a, b) in places.items()}

    def _sent_over(self, words: Tensor) -> Tensor:
        # memory of a copy that is still under way is not handed out again by the pinned allocator
        pinned = words.pin_memory() if self.device.type == "cuda" else words
        return pinned.to(self.device, non_blocking=True, copy=True)
