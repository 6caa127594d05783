"""VectorFit (arXiv 2503.19530): the singular values and biases of a model's weights are trained.

    W = U S V^T once,    W' = U (S + diag(delta)) V^T,    b' = b + delta_b,    both deltas 0 at first

W stays as it is and the change goes beside it, so that at first the model is the base, bit for bit:

    y = x W'^T + b' = (x W^T + b) + ((x V) * delta) U^T + delta_b

Of k = min(m, n) singular values, or the leading ones with `rank`, a weight (m, n) trains k numbers, and
m more where it has a bias. The price is memory: U and V are k (m + n) frozen numbers beside the m n of
W, in the same dtype, and each token keeps k activations. They are not saved: an adapter's folder holds
the deltas, and whoever loads it takes the singular vectors of the base anew; u v^T has no sign to choose.

PEFT knows the method by its name once `register` was called: a tuner like its own.
"""

from __future__ import annotations

from typing import Any

NAME = "vectorfit"


def register() -> None:
    """Make the method known to PEFT, as one of its own; once, however often it is called."""
    from peft.utils.peft_types import PeftType, register_peft_method

    from lowmem.models.vectorfit.tuner import config_class, tuner_class

    if NAME.upper() in PeftType.__members__:
        return
    _extend_(PeftType, NAME.upper())
    register_peft_method(name=NAME, config_cls=config_class(), model_cls=tuner_class())


def _extend_(names: Any, name: str) -> None:
    """Give an enumeration of texts one member more: PEFT keeps its methods' names in one, and looks in it."""
    member: Any = str.__new__(names, name)
    member._name_ = member._value_ = name
    type.__setattr__(names, name, member)
    names._member_map_[name] = names._value2member_map_[name] = member
    names._member_names_.append(name)
