"""Which packages have which method, and how their optimizers are made, for `speed`.

An optimizer takes the matrices and, last, an embedding; where it projects or orthogonalises, the embedding is
in a group of its own, as each package wants it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

LR = 1e-4
GAP = "update_proj_gap"
NEVER = 10**6
Params = Sequence[nn.Parameter]
Make = Callable[[Any, Params], Any]


@dataclass(frozen=True)
class Peer:
    """An optimizer of a package.

    Args:
        package: to import; name: in it, with dots; make: the optimizer from its class and the parameters.
    """

    package: str
    name: str
    make: Make

    @property
    def full(self) -> str:
        """As it is told."""
        return f"{self.package.partition('.')[0]} {self.name.rpartition('.')[2]}"

    def step(self, params: Params) -> Callable[[], object]:
        """Its step, which has run once.

        Raises:
            ImportError: the package is not installed.
        """
        kind: Any = importlib.import_module(self.package)
        for part in self.name.split("."):
            kind = getattr(kind, part)
        step: Callable[[], object] = self.make(kind, params).step
        step()
        return step


def plain(package: str, name: str, **told: Any) -> Peer:
    """Of all parameters alike."""
    return Peer(package, name, lambda kind, params: kind(list(params), lr=LR, **told))


def grouped(package: str, name: str, own: Mapping[str, Any], other: Mapping[str, Any], **told: Any) -> Peer:
    """The matrices with options of their own, the embedding with others."""

    def make(kind: Any, params: Params) -> Any:
        groups = [{"params": list(params[:-1]), **own}, {"params": list(params[-1:]), **other}]
        return kind(groups, lr=LR, **told)

    return Peer(package, name, make)


def _schedule_free(kind: Any, params: Params) -> Any:
    optimizer = kind(list(params), lr=LR, foreach=False)
    optimizer.train()
    return optimizer


def _adam_mini(kind: Any, params: Params) -> Any:
    named = [(f"layers.{i}.mlp.weight", p) for i, p in enumerate(params[:-1])]
    named.append(("embed_tokens.weight", params[-1]))
    return kind(named, lr=LR, dim=params[0].shape[1], n_heads=8, verbose=False)


def _only_matrices(kind: Any, params: Params) -> Any:
    return kind(list(params[:-1]), lr=LR)


def _kozistr(name: str) -> Peer:
    return plain("pytorch_optimizer", name)


def _apollo(rank: int, kind: str) -> Peer:
    own = {"rank": rank, GAP: NEVER, "scale": 1.0, "scale_type": kind, "proj": "random", "proj_type": "std"}
    return grouped("apollo_torch", "APOLLOAdamW", own, {})


def peers(rank: int) -> dict[str, tuple[Peer, ...]]:
    """By method.

    Args:
        rank: of what is projected.
    """
    projected = {"rank": rank, GAP: NEVER, "scale": 0.25}
    first, std = {**projected, "proj_type": "std"}, {**projected, "projection_type": "std"}
    muon = ({"use_muon": True}, {"use_muon": False})
    factored = {"scale_parameter": False, "relative_step": False}
    alone = {
        "adan": "Adan", "adabelief": "AdaBelief", "laprop": "LaProp", "adamp": "AdamP",
        "diffgrad": "DiffGrad", "fadam": "FAdam", "ano": "Ano", "novograd": "NovoGrad",
        "stable_spam": "StableSPAM", "spam": "SPAM", "mars": "MARS", "gravity": "Gravity", "sm3": "SM3",
        "signsgd": "SignSGD", "lamb": "Lamb", "tam": "TAM",
    }  # fmt: skip
    return {name: (_kozistr(kind),) for name, kind in alone.items()} | {
        "sgd": (plain("torch", "optim.SGD", fused=True), _kozistr("SGD")),
        "amsgrad": (plain("torch", "optim.AdamW", amsgrad=True, fused=True),),
        "nadam": (plain("torch", "optim.NAdam", foreach=True), _kozistr("NAdam")),
        "lion": (
            plain("lion_pytorch", "Lion"),
            plain("bitsandbytes", "optim.Lion", optim_bits=32),
            _kozistr("Lion"),
        ),
        "ademamix": (plain("bitsandbytes", "optim.AdEMAMix", optim_bits=32), _kozistr("AdEMAMix")),
        "adamw_8bit": (plain("bitsandbytes", "optim.AdamW8bit"), plain("torchao.optim", "AdamW8bit")),
        "adamw_4bit": (plain("torchao.optim", "AdamW4bit"),),
        "adafactor": (
            plain("transformers.optimization", "Adafactor", **factored), plain("torch", "optim.Adafactor"),
            _kozistr("AdaFactor"),
        ),
        "came": (plain("came_pytorch", "CAME", betas=(0.9, 0.999, 0.9999)), _kozistr("CAME")),
        "adam_mini": (Peer("adam_mini", "Adam_mini", _adam_mini),),
        "sgd_sai": (plain("sgd_sai", "SGD_sai"), _kozistr("SGDSaI")),
        "schedule_free": (
            Peer("schedulefree", "AdamWScheduleFree", _schedule_free), _kozistr("ScheduleFreeAdamW"),
        ),
        "subset_norm": (grouped("pytorch_optimizer", "AdamWSN", {"sn": True}, {"sn": False}),),
        "galore": (
            grouped("galore_torch", "GaLoreAdamW", first, {}, no_deprecation_warning=True),
            grouped("pytorch_optimizer", "GaLore", std, {}),
        ),
        "fira": (grouped("pytorch_optimizer", "Fira", std, {}),),
        "apollo": (_apollo(rank, "channel"),),
        "apollo_mini": (_apollo(1, "tensor"),),
        "muon": (
            Peer("torch", "optim.Muon", _only_matrices), grouped("pytorch_optimizer", "Muon", *muon),
        ),
        "ada_muon": (grouped("pytorch_optimizer", "AdaMuon", *muon),),
    }  # fmt: skip
