"""What would have no effect is refused at every entrance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import lowmem
import lowmem.cli as cli
from lowmem.config import build
from lowmem.errors import ConfigError, UserError
from lowmem.optim.tensors.checks import idle
from lowmem.optim.tensors.groups import param_groups
from lowmem.training.arguments import LowMemArguments, LowMemSFTConfig
from lowmem.training.tasks import refuse
from tests.enrolled import on_any_model

NUMBERS: list[dict[str, Any]] = [{"betas": (0.8, 0.9)}, {"eps": 1e-4}]


def by_optimizer(name: str, numbers: dict[str, Any], folder: Path) -> None:
    lowmem.optimizer(torch.nn.Linear(8, 8), name, lr=1e-3, **numbers)


def by_factory(name: str, numbers: dict[str, Any], folder: Path) -> None:
    lowmem.hf_optimizer(name, lr=1e-3, **numbers)


def by_arguments(name: str, numbers: dict[str, Any], folder: Path, kind: Any = LowMemArguments) -> None:
    fields = dict(zip(("adam_beta1", "adam_beta2"), numbers.get("betas", ()), strict=False))
    fields |= {"adam_epsilon": numbers["eps"]} if "eps" in numbers else {}
    kind(output_dir=str(folder), optim=name, use_cpu=True, bf16=False, **fields)


def by_sft_config(name: str, numbers: dict[str, Any], folder: Path) -> None:
    by_arguments(name, numbers, folder, LowMemSFTConfig)


def by_command(name: str, numbers: dict[str, Any], folder: Path) -> None:
    betas = ",".join(map(str, numbers.get("betas", (0.9, 0.999))))
    text = f"model: gpt2\noptim: {name}\nbetas: [{betas}]\neps: {numbers.get('eps', 1e-8)}\n"
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    done = CliRunner().invoke(cli.app, ["validate", str(folder / "run.yaml")])
    if done.exit_code:
        raise UserError(done.stderr)


ENTRANCES = [by_optimizer, by_factory, by_arguments, by_sft_config, by_command]


@pytest.mark.parametrize("enter", ENTRANCES)
@pytest.mark.parametrize("numbers", NUMBERS, ids=["betas", "eps"])
def test_numbers_that_no_rule_reads(
    enter: Callable[..., None], numbers: dict[str, Any], tmp_path: Path
) -> None:
    (number,) = numbers
    for name in ("mezo", "adafactor") if enter is not by_factory else ("adafactor",):
        reads = lowmem.create(name).rules.values()
        if not idle(name, reads, **({"betas": (0.9, 0.999), "eps": 1e-8} | numbers)):
            pytest.fail(f"{name} reads {number}")
        with pytest.raises(UserError, match=f"{number}: no rule of {name} reads it"):
            enter(name, numbers, tmp_path)
        enter(name, {}, tmp_path)
    enter("galore", numbers, tmp_path)
    enter("adamw", numbers, tmp_path)


@pytest.mark.parametrize("name", sorted(on_any_model()))
def test_a_rule_reads_what_it_says(name: str) -> None:
    """A number that is refused leaves every bit as it is; one that is not changes some."""

    def weights(**numbers: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(96, 96), torch.nn.Linear(96, 64))
        groups = param_groups(model)
        optimizer = lowmem.LowMemOptimizer(groups, strategy, lr=1e-2, compile="off", model=model, **numbers)
        x = torch.randn(8, 96)
        for _ in range(3):
            loss = optimizer.backward(lambda: model(x).square().mean(), model)
            loss.backward() if loss.requires_grad else None
            if optimizer.probe_due:
                optimizer.probe(model(x))
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in model.parameters()]

    strategy = lowmem.create(name)
    before = weights()
    for numbers in NUMBERS:
        given = {"betas": (0.9, 0.999), "eps": 1e-8} | numbers
        refused = bool(idle(name, strategy.rules.values(), **given))
        same = all(torch.equal(a, b) for a, b in zip(before, weights(**numbers), strict=True))
        assert same == refused, numbers


def test_what_one_rule_of_a_strategy_reads_has_an_effect() -> None:
    class Root:
        uses = frozenset({"eps"})

    class Averages:
        uses = frozenset({"betas"})

    numbers: dict[str, Any] = {"betas": (0.5, 0.5), "eps": 1e-3}
    assert [text.split(":")[0] for text in idle("x", [Root()], **numbers)] == ["betas"]
    assert [text.split(":")[0] for text in idle("x", [Averages()], **numbers)] == ["eps"]
    assert idle("x", [Root(), Averages()], **numbers) == []


@pytest.mark.parametrize("name", ["mezo"])
def test_a_loop_of_loss_backward_names_what_to_call(name: str) -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = lowmem.optimizer(model, name, lr=1e-3)
    loss = model(torch.ones(2, 4)).sum()
    loss.backward()
    with pytest.raises(UserError, match=r"call optimizer\.backward\(loss_fn\)"):
        optimizer.step()
    optimizer.backward(lambda: model(torch.ones(2, 4)).sum(), model)
    optimizer.zero_grad()
    with pytest.raises(UserError, match=r"call optimizer\.backward\(loss_fn\)"):
        optimizer.step()
    before = model.weight.detach().clone()
    optimizer.step(lambda: model(torch.ones(2, 4)).sum())
    assert not torch.equal(model.weight, before)


def test_all_problems_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        LowMemArguments(
            output_dir=str(tmp_path), optim="adafactor", adam_beta1=0.5, adam_epsilon=1e-3, clip="no"
        )
    assert [text.split(":")[0] for text in caught.value.problems] == ["clip", "betas", "eps"]


NOISE: list[tuple[dict[str, Any], str]] = [
    ({"neftune": 5}, "neftune"),
    ({"lora_rank": 2, "lora_dropout": 0.1}, "lora_dropout"),
    (
        {"adapter": "vera", "adapter_args": "vera_dropout=0.1,projection_prng_key=3"},
        "adapter_args vera_dropout",
    ),
]


@pytest.mark.parametrize(("given", "name"), NOISE)
@pytest.mark.parametrize("optim", ["mezo", "adamw"])
def test_noise_in_a_loss_that_is_evaluated_without(
    optim: str, given: dict[str, Any], name: str, tmp_path: Path
) -> None:
    """Refused beside everything else, when a configuration is checked and when a run begins."""
    (tmp_path / "rows.jsonl").write_text("")
    values = {"model": "gpt2", "optim": optim, "data": str(tmp_path / "rows.jsonl"), "few_bit": 3, **given}
    said = f"{name}: mezo evaluates the loss without noise and dropout; leave it out"
    (tmp_path / "run.yaml").write_text("".join(f"{key}: {value}\n" for key, value in values.items()))
    done = CliRunner().invoke(cli.app, ["validate", str(tmp_path / "run.yaml")])
    if optim == "adamw":
        assert done.exit_code == 0, done.stderr
        refuse(build(values), cuda=False)
        return
    assert (done.exit_code, said in done.stderr, "few_bit" in done.stderr) == (2, True, True), done.stderr
    with pytest.raises(ConfigError) as caught:
        refuse(build(values), cuda=False)
    assert {said, "few_bit: mezo keeps no activations for a backward pass; leave it out"} <= {
        *caught.value.problems
    }


@pytest.mark.parametrize("kind", [LowMemArguments, LowMemSFTConfig])
def test_noise_in_arguments_of_a_method_without_gradients(kind: Any, tmp_path: Path) -> None:
    values = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "neftune_noise_alpha": 5.0}
    kind(optim="adamw", **values)
    with pytest.raises(ConfigError, match="neftune_noise_alpha: mezo evaluates without noise; leave it out"):
        kind(optim="mezo", **values)
