"""The step of a chunk is one graph: nothing in it depends on a value, whatever the rule and the writer."""

from __future__ import annotations

import pytest
import torch

from lowmem.sources import directions
from lowmem.training.contract import zoo
from tests.contract import cases, runs
from tests.contract.cases import Case

COMPOSED = [
    ("galore", {"states": "int8"}, torch.float32),
    ("galore", {"states": "int4"}, torch.float32),
    ("galore", {"states": "companded8"}, torch.float32),
    ("adamw", {"states": "bf16", "writer": "kahan"}, torch.bfloat16),
    ("adamw", {"writer": "split"}, torch.bfloat16),
]
"""Every codec and every writer that the plain cases leave out, once."""


@pytest.mark.costly
@pytest.mark.plain
def test_kernels_trace_into_one_graph(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(case, dtype, monkeypatch)


@pytest.mark.parametrize(("name", "changes", "dtype"), COMPOSED, ids=str)
def test_so_do_those_of_each_codec_and_writer(
    name: str, changes: dict[str, str], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(cases.case(name, **changes), dtype, monkeypatch)


def check(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a backend that only runs what was traced: a graph break or a second graph is an error."""
    made: list[str] = []
    kernels: list[object] = []

    compile = torch.compile

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        made.append(str(graph.graph))
        return graph.forward

    def traced(kernel: object, *, fullgraph: bool, **_: object) -> object:
        assert fullgraph
        kernels.append(kernel)
        return compile(kernel, fullgraph=True, backend=backend)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", traced)
    model = zoo.build(dtype)
    optimizer = case.optimizer(model, compile="on")
    for step in range(runs.GAP + 2):  # lr, step and age move: none of them may compile again
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        runs.advance(optimizer, model, step)
    assert len(made) == len(kernels)
    pays = [getattr(rule, "compilable", True) for rule in case.create().rules.values()]
    assert kernels or not any(pays)
    monkeypatch.undo()
    torch._dynamo.reset()
    directions._kernel.cache_clear()  # kept for the process: those made here run eagerly
    eager = zoo.build(dtype)
    plain = case.optimizer(eager, compile="off")
    for step in range(runs.GAP + 2):
        plain.param_groups[0]["lr"] = 1e-2 / (step + 1)
        runs.advance(plain, eager, step)
    for name, w in zoo.weights(eager).items():
        other = zoo.weights(model)[name]
        assert torch.isfinite(other).all()
        moved = (w.float() - zoo.weights(zoo.build(dtype))[name].float()).norm()
        assert (w.float() - other.float()).norm() <= 0.02 * moved + 1e-6, name
