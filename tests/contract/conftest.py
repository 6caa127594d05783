"""Each contract test runs over every method and every part, in fp32 or bf16 where it asks for a dtype."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("lowmem.strategies", reason="the strategies are not there")

from lowmem.optim.writers import Stochastic
from tests.contract import cases


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "plain: every method as it comes is enough")
    config.addinivalue_line("markers", "changed: every option changed as well")
    config.addinivalue_line("markers", "kinds: it is the frame that is asked; methods of one make are one")
    config.addinivalue_line(
        "markers",
        "costly(width): a run for each case; outside the width, by default kinds, thorough",
    )
    config.addinivalue_line("markers", "both: methods as they come in fp32 and bf16, not in turns")


def dtypes_of(case: cases.Case, both: bool) -> tuple[torch.dtype, ...]:
    """Both where a method is as it comes and the test asks for it; one otherwise, to keep the suite short."""
    if case.create().writer != Stochastic():
        return (torch.bfloat16,)  # fp32 weights are written to nearest
    if both and not case.varied:
        return (torch.float32, torch.bfloat16)
    return (torch.float32,) if sum(map(ord, str(case))) % 2 else (torch.bfloat16,)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    marks = [
        width for width in ("plain", "changed", "kinds") if metafunc.definition.get_closest_marker(width)
    ]
    found = cases.choose(marks[0] if marks else "each")
    if "dtype" not in metafunc.fixturenames:
        in_fp32 = [case for case in found if case.create().writer == Stochastic()]
        metafunc.parametrize("case", in_fp32, ids=str)
        return
    both = metafunc.definition.get_closest_marker("both") is not None
    pairs = [(case, dtype) for case in found for dtype in dtypes_of(case, both)]
    costly = metafunc.definition.get_closest_marker("costly")
    stand = frozenset(cases.choose(*costly.args or ("kinds",))) if costly else frozenset(found)
    told = [
        pytest.param(
            case,
            dtype,
            id=f"{case}-{str(dtype).removeprefix('torch.')}",
            marks=[] if case in stand else [pytest.mark.thorough],
        )
        for case, dtype in pairs
    ]
    metafunc.parametrize(("case", "dtype"), told)


@pytest.fixture(autouse=True)
def _global_generator_is_left_alone() -> Iterator[None]:
    """Whatever a contract test does, the library has drawn nothing from the global generator."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())
