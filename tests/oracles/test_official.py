"""Methods against packages that implement them, on a CPU: several steps of one matrix, step by step.

Both are the same arithmetic here; where a package is not the paper, see test_deviations. A package that is
not installed is skipped.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from lowmem.optim.evaluated import evaluated
from tests.oracles.drive import follow, gradients, on_weights, start_of, step
from tests.oracles.official import (
    ADAM,
    DECAY,
    LR,
    SHAPE,
    STEPS,
    Make,
    Pair,
    apart,
    apollo,
    aside,
    kozistr,
    module_of,
    paired,
    schedule_free,
)  # fmt: skip

FLAT: dict[str, Any] = {"hyper": {}}
GALORE = {"rank": 3, "update_proj_gap": 200, "scale": 0.25}


def galore(module: Any, params: list[Any]) -> Any:
    groups = [{"params": params, "projection_type": "std", **GALORE}]
    return module.GaLore(groups, lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def muon(module: Any, params: list[Any]) -> Any:
    return module.optim.Muon(params, lr=LR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")


def adam_mini(name: str) -> Make:
    told = {"lr": LR, "weight_decay": 0.1, "dim": 12, "n_heads": 3, "verbose": False}
    return lambda module, params: module.Adam_mini([(name, params[0])], **told)


def bnb(kind: str, betas: tuple[float, ...], **told: Any) -> Make:
    return lambda module, params: getattr(module.optim, kind)(
        params, lr=LR, betas=betas, weight_decay=0.1, **told
    )


EQUAL: dict[str, Pair] = {
    # the authors' own packages
    "came-pytorch": Pair(
        "came_pytorch",
        lambda of, p: of.CAME(p, lr=LR, betas=(0.9, 0.999, 0.9999), weight_decay=0.1),
        "came", hyper={**ADAM, **DECAY}, close=5e-7,
    ),
    "adam-mini, a projection": Pair(
        "adam_mini", adam_mini("layers.0.self_attn.o_proj.weight"), "adam_mini", hyper={**ADAM, **DECAY}
    ),
    "lion-pytorch": Pair(
        "lion_pytorch", lambda of, p: of.Lion(p, lr=LR, betas=(0.9, 0.99), weight_decay=0.1),
        "lion", hyper={"lr": LR, "betas": (0.9, 0.99), **DECAY}, close=0.0,
    ),
    "grams-pytorch": Pair(
        "grams",
        lambda of, p: of.Grams(p, lr=LR, betas=(0.9, 0.999), eps=1e-12, weight_decay=0.1),
        "adamw", {"modifiers": "grams"}, {**ADAM, "eps": 1e-12, **DECAY},
    ),
    "sgd-sai": Pair(
        "sgd_sai", lambda of, p: of.SGD_sai(p, lr=1e-3, weight_decay=0.1), "sgd_sai",
        hyper={"lr": 1e-3, "eps": 1e-8, **DECAY},
    ),
    "schedulefree": Pair("schedulefree", schedule_free, "schedule_free", hyper=ADAM),
    "schedulefree, warmup": Pair(
        "schedulefree", lambda of, p: schedule_free(of, p, warmup_steps=4), "schedule_free",
        {"warmup": 4}, ADAM,
    ),
    "apollo-torch": Pair(
        "apollo_torch", apollo("channel", 3, 1.0, disable_nl=True), "apollo",
        {"projector": "svd", "rank": 3, "limit": 0.0}, ADAM, close=2e-6,
    ),
    "apollo-torch, mini": Pair(
        "apollo_torch", apollo("tensor", 1, 128.0, disable_nl=True), "apollo_mini",
        {"projector": "svd", "rank": 1, "limit": 0.0}, ADAM, close=2e-6,
    ),
    "torch, Muon (its products are of bf16)": Pair(
        "torch", muon, "muon", hyper={"lr": LR, **DECAY}, close=5e-4
    ),
    "bitsandbytes, Lion of 32 bits": Pair(
        "bitsandbytes", bnb("Lion", (0.9, 0.99), optim_bits=32), "lion",
        hyper={"lr": LR, "betas": (0.9, 0.99), **DECAY},
    ),
    "bitsandbytes, AdEMAMix of 32 bits": Pair(
        "bitsandbytes", bnb("AdEMAMix", (0.9, 0.999, 0.9999), optim_bits=32, alpha=2.0), "ademamix",
        hyper={**ADAM, **DECAY},
    ),
    # pytorch_optimizer
    "Lion": paired("Lion", "lion", (0.9, 0.99), close=0.0, hyper={**DECAY}),
    "Adan": paired("Adan", "adan", (0.98, 0.92, 0.99)),
    "AdEMAMix": paired("AdEMAMix", "ademamix", (0.9, 0.999, 0.9999), alpha=2.0),
    "AdaBelief": paired("AdaBelief", "adabelief", hyper={**DECAY, "eps": 1e-12}),
    "AdaBelief, rectified": paired(
        "AdaBelief", "adabelief", hyper={**DECAY, "eps": 1e-12}, rectify=True, options={"rectify": True}
    ),
    "LaProp": paired("LaProp", "laprop", hyper={"eps": 1e-15}),
    "AdamP": paired("AdamP", "adamp", hyper={**DECAY, "eps": 1e-12}),
    "AdamP, free lengths": paired(
        "AdamP", "adamp", hyper={**DECAY, "eps": 1e-12}, delta=2.0, options={"delta": 2.0}
    ),
    "DiffGrad": paired("DiffGrad", "diffgrad"),
    "FAdam": paired("FAdam", "fadam", **FLAT, weight_decay=0.0),
    "Ano, eps outside": paired("Ano", "ano", (0.92, 0.99)),
    "NovoGrad": paired("NovoGrad", "novograd", (0.95, 0.98), **FLAT),
    "NAdam": paired("NAdam", "nadam", hyper={}),
    "ScheduleFreeAdamW": paired("ScheduleFreeAdamW", "schedule_free", **FLAT),
    "CAME": paired("CAME", "came", (0.9, 0.999, 0.9999), **FLAT, close=5e-7),
    "StableSPAM before its reset": paired("StableSPAM", "stable_spam", **FLAT),
    "SPAM": paired("SPAM", "spam", hyper={"eps": 1e-14}, warmup_epoch=1),
    "MARS, clipped": paired("MARS", "mars", (0.95, 0.99), hyper={"eps": 1e-12}),
    "Gravity from zero": Pair(
        "pytorch_optimizer", kozistr("Gravity", alpha=1e-30), "gravity",
        hyper={"lr": LR, "betas": (0.9, 0.999)},
    ),
    "SM3": Pair("pytorch_optimizer", kozistr("SM3"), "sm3", hyper={"lr": LR}),
    "SM3, averaged": Pair(
        "pytorch_optimizer", kozistr("SM3", momentum=0.9), "sm3", {"momentum": 0.9}, {"lr": LR}
    ),
    "AdaFactor": Pair(
        "pytorch_optimizer",
        kozistr("AdaFactor", betas=(None, 0.999), scale_parameter=False, relative_step=False),
        "adafactor", hyper={"lr": LR},
    ),
    "SignSGD": Pair(
        "pytorch_optimizer", kozistr("SignSGD", momentum=0.0), "signsgd", hyper={"lr": LR}, close=0.0
    ),
    "AdamWSN": Pair(
        "pytorch_optimizer",
        lambda of, p: of.AdamWSN([{"params": p, "sn": True}], lr=LR, betas=(0.9, 0.999), subset_size=4
        ),
        "subset_norm", {"subset_size": 4}, ADAM,
    ),
    "GaLore": Pair(
        "pytorch_optimizer", galore, "galore", {"projector": "svd", **GALORE}, ADAM, close=1e-6
    ),
    "Lookahead": Pair(
        "pytorch_optimizer",
        lambda of, p: of.Lookahead(torch.optim.AdamW(p, lr=LR, weight_decay=0.0), k=3, alpha=0.5),
        "adamw", {"modifiers": "lookahead", "every": 3, "share": 0.5}, ADAM,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(EQUAL))
def test_steps_are_those_of_the_package(name: str) -> None:
    assert max(apart(EQUAL[name])) <= EQUAL[name].close


def test_ada_muon_is_the_package_with_products_of_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own are of bf16: 0.05 lr apart from the second step on, as each element is divided by its size."""
    module_of("pytorch_optimizer")
    muon = module_of("pytorch_optimizer.optimizer.muon.adamuon")
    made = functools.partial(muon.zero_power_via_newton_schulz_5, dtype=torch.float32)
    monkeypatch.setattr(muon, "zero_power_via_newton_schulz_5", made)
    told = {"lr": LR, "betas": (0.95, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    pair = Pair(
        "pytorch_optimizer",
        lambda of, p: of.AdaMuon([{"params": p, "use_muon": True}], **told),
        "ada_muon",
        {"sign": False, "nesterov": False},
        {**ADAM, **DECAY},
    )
    assert max(apart(pair)) <= pair.close


@pytest.mark.parametrize(
    ("package", "kind", "name"),
    [
        ("lomo_optim", "Lomo", "lomo"),
        ("pytorch_optimizer", "LOMO", "lomo"),
        ("pytorch_optimizer", "AdaLOMO", "ada_lomo"),
    ],
)
def test_steps_inside_backward_are_those_of_the_package(package: str, kind: str, name: str) -> None:
    module, model = module_of(package), nn.Linear(SHAPE[1], SHAPE[0], bias=False)
    model.weight = nn.Parameter(start_of(SHAPE))
    grads = gradients(SHAPE, STEPS)
    with aside():
        optimizer = getattr(module, kind)(model, lr=LR)
    for g, w in zip(grads, follow(name, start_of(SHAPE), grads, hyper={"lr": LR}), strict=True):
        optimizer.fused_backward((model.weight * g).sum(), LR)
        torch.testing.assert_close(model.weight.detach(), w, rtol=0, atol=1e-7)


def test_schedule_free_evaluates_where_the_package_does() -> None:
    module, p = module_of("schedulefree"), nn.Parameter(start_of(SHAPE))
    theirs, (one, params) = (
        schedule_free(module, [p]),
        on_weights("schedule_free", {"w": start_of(SHAPE)}, hyper=ADAM),
    )
    for g in gradients(SHAPE, STEPS):
        p.grad = g.clone()
        theirs.step()
        step(one, params, {"w": g})
    theirs.eval()
    assert not torch.allclose(params["w"], p, rtol=0, atol=1e-4)
    with evaluated(one):
        torch.testing.assert_close(params["w"].detach(), p.detach(), rtol=0, atol=5e-7)
