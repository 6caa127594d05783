"""Each contract test runs over every case, in fp32 and bf16 where it asks for a dtype."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("lowmem.strategies", reason="the strategies are not there")

from tests.contract import cases


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "plain: one case for each strategy is enough")
    config.addinivalue_line("markers", "composed: compositions of options as well as each option alone")


def dtypes_of(case: cases.Case, *, in_full: bool) -> tuple[torch.dtype, ...]:
    """Both where the case is plain, or the test asks for all; otherwise enough to keep the suite short."""
    if "writer" in case.varied or len(case.varied) > 1:
        return (torch.bfloat16,)
    if in_full or not case.varied:
        return (torch.float32, torch.bfloat16)
    return (torch.float32,) if sum(map(ord, str(case))) % 2 else (torch.bfloat16,)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    marks = [width for width in ("plain", "composed") if metafunc.definition.get_closest_marker(width)]
    found = cases.choose(marks[0] if marks else "single")
    in_fp32 = [case for case in found if "writer" not in case.varied]  # fp32 weights are written to nearest
    if "dtype" not in metafunc.fixturenames:
        metafunc.parametrize("case", in_fp32, ids=str)
        return
    pairs = [(case, dtype) for case in found for dtype in dtypes_of(case, in_full=bool(marks))]
    ids = [f"{case}-{str(dtype).removeprefix('torch.')}" for case, dtype in pairs]
    metafunc.parametrize(("case", "dtype"), pairs, ids=ids)


@pytest.fixture(autouse=True)
def _global_generator_is_left_alone() -> Iterator[None]:
    """Whatever a contract test does, the library has drawn nothing from the global generator."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())
