"""A compiled kernel is called without torch.compile after its first call, unless that would be wrong."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.exc import CppCompileError, InductorError

import lowmem
from lowmem.optim.blocks import Dense
from lowmem.optim.codecs.blockwise import codec
from lowmem.optim.elementwise import coded
from lowmem.optim.engine.chunks import Chunks
from lowmem.optim.engine.compiling import kernel as compiling
from lowmem.optim.engine.compiling import private
from lowmem.optim.engine.compiling.kernel import Compiled, compiled
from lowmem.optim.engine.compiling.private import ABSENT, PRIVATE
from lowmem.optim.engine.compiling.processor import forget_instructions
from lowmem.optim.engine.layout import ROW
from lowmem.optim.rules.elementwise.adam import Adam
from lowmem.optim.rules.elementwise.moments import Momentum
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import made
from lowmem.strategies import parts

pytestmark = pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's own compiler

CODES = coded(Momentum(0.9), "int8")
NOISY = coded(Momentum(0.9), "bf16")


class Whole(Chunks):
    """Cuts nothing: a chunk has as many rows as its tensor."""

    def spans(self, rule: Any, count: int, device: Any, most: int = 0, **_: Any) -> Any:
        return ((0, count, count),)


WRITERS = {name: part.make({}) for name, part in parts("writer").items()}
"""Kernels go by their identity: one of each."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def steps(chunks: Chunks, rule: Any, writer: str, dtype: torch.dtype, rows: int, seed: int) -> list[Tensor]:
    """All that two steps of `rows` rows leave behind; without a writer, of a projected gradient."""
    w = normal(rows, ROW, seed=seed).to(dtype)
    state = {**rule.init(w), **made(rule.constants(tuple(w.shape)), w.device), "rate": torch.tensor(0.5)}
    state.setdefault("age", torch.zeros((), dtype=torch.int32))
    stored = WRITERS.get(writer)
    extra = stored.init(w) if stored else {}
    left = [w, *state.values(), *extra.values()]
    for t in range(2):
        g = normal(rows, ROW, seed=seed + t + 1).to(dtype)
        hp = Hyper(t, "w", 0, 0.1, (0.9, 0.99), 1e-8, 0.01, Dense(w), chunks.advance_)
        if stored:
            g[0, 3] = math.nan
            chunks.apply_(rule, stored, w, Dense(g), state, extra, hp)
        else:
            left += [chunks.advance_(rule, g, state, hp), g]
    return [*left, torch.tensor(chunks.skipped.total())]


def forbid_torch_compile(kernel: Any) -> None:
    def again(*_: Tensor) -> None:
        pytest.fail("the kernel went through torch.compile again")

    kernel._whole = again


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "writer", "dtype", "allowed"),
    [
        (CODES, "kahan", torch.bfloat16, 0.0),
        (NOISY, "stochastic", torch.bfloat16, 0.0),
        (CODES, "", torch.float32, 0.0),
        # addcmul rounds once in torch and twice in generated code, for numbers of order 1
        (coded(Adam()), "nearest", torch.float32, 2.0**-21),
    ],
    ids=["codes", "noise", "projected", "adam"],
)
def test_a_direct_call_is_the_eager_step_for_any_number_of_rows(
    rule: Any, writer: str, dtype: torch.dtype, allowed: float
) -> None:
    fast, eager = Whole(compile=True), Whole()
    for seed, rows in enumerate((3, 1, 7, 64, 3, 1)):
        given = (rule, writer, dtype, rows, 10 * seed)
        for ours, theirs in zip(steps(fast, *given), steps(eager, *given), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=allowed, atol=allowed)
        if seed == 1:
            for kernel in fast._kernels.values():
                forbid_torch_compile(kernel)
    assert [len(kernel._graphs) for kernel in fast._kernels.values()] == [1, 1]  # 1 row has its own


@pytest.mark.slow
@pytest.mark.parametrize("states", ["int8", "companded8"])
def test_second_moments_above_zero_have_the_eager_codes(states: str) -> None:
    held_by = codec(states, signed=False, stream="m")
    sizes = torch.logspace(-30, 12, 64).view(64, 1)
    x = normal(64, 4 * ROW).square() * sizes[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    x = x.t().contiguous().view(-1, held_by.grain)  # every size in every block
    x[:, ::5] = 0.0
    tables = held_by.shared(x)

    def encode(values: Tensor, codes: Tensor, scale: Tensor, *constants: Tensor) -> None:
        held = held_by.encode(values, None, dict(zip(tables, constants, strict=True)))  # type: ignore[arg-type]
        codes.copy_(held["codes"])
        scale.copy_(held["scale"])

    left = []
    for run in (compiled(encode), encode):
        held = {key: value.view(x.shape[0], -1) for key, value in held_by.init(x).items()}
        run(x, held["codes"], held["scale"], *tables.values())
        left.append(held)
    assert torch.equal(left[0]["codes"], left[1]["codes"])
    assert torch.equal(left[0]["scale"], left[1]["scale"])
    assert torch.equal(left[0]["codes"] > 0, x > 0.0)


def add(w: Tensor, g: Tensor) -> None:
    w.add_(g)


def assert_adds(kernel: Any, width: int) -> None:
    """A kernel of `add` is right, and called directly from the second call on."""
    for rows in (3, 7):
        w, g = normal(rows, width), normal(rows, width, seed=1)
        expected = w + g
        kernel(w, g)
        assert torch.equal(w, expected)
        forbid_torch_compile(kernel)


def test_kernels_of_one_step_do_not_share_what_torch_remembers_of_sizes() -> None:
    for width in (256, 512):
        assert_adds(compiled(add), width)


def test_a_tensor_from_outside_is_left_to_torch_compile() -> None:
    factor = normal(ROW)

    def step(w: Tensor, g: Tensor) -> None:
        w.add_(g * factor)

    kernel = Compiled(step)
    for rows in (3, 7, 64):
        factor = normal(ROW, seed=rows)
        w, g = normal(rows, ROW, seed=1), normal(rows, ROW, seed=2)
        expected = w + g * factor
        kernel(w, g)
        assert torch.equal(w, expected)
    assert len(kernel._graphs) == 1


def test_what_a_graph_gives_back_is_left_to_torch_compile() -> None:
    kept = {"largest": torch.zeros(())}

    def step(w: Tensor, g: Tensor) -> Tensor:
        kept["largest"] = g.amax()
        return w.add_(g)

    kernel = Compiled(step)
    for rows in (3, 7, 64):
        w, g = normal(rows, ROW, seed=1), normal(rows, ROW, seed=rows)
        expected = w + g
        kernel(w, g)
        assert torch.equal(w, expected)
        assert torch.equal(kept["largest"], g.amax())
    assert len(kernel._graphs) == 1


@pytest.mark.parametrize("gone", [*PRIVATE, "current_callable"])
def test_a_private_name_that_is_gone_is_done_without(
    gone: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The step is right for any number of rows, and what is missing is said once, to who debugs."""
    if gone == "current_callable":
        home = importlib.import_module("torch._inductor.compile_fx")
        inner = home.compile_fx_inner
        monkeypatch.setattr(home, "compile_fx_inner", lambda *a, **more: inner(*a, **more).__call__)
    look, last = private.look, gone.rpartition(".")[-1]
    monkeypatch.setattr(private, "look", lambda home, x: ABSENT if x == last else look(home, x))
    private.say.cache_clear()
    caplog.set_level("DEBUG", logger=private.log.name)
    kernels = [compiled(add), compiled(add)]
    for kernel, rows in itertools.product(kernels, (3, 7, 64, 1)):
        w, g = normal(rows, ROW), normal(rows, ROW, seed=1)
        expected = w + g
        kernel(w, g)
        assert torch.equal(w, expected)
    said = [record for record in caplog.records if gone in record.getMessage()]
    assert len(said) == (gone in caplog.text)
    assert all(record.levelname == "DEBUG" for record in said)
    needed = ("compile_fx", "compile_fx_inner", "vec_isa_ok", "mark_dynamic", "enable_autograd_cache")
    assert not gone.endswith(needed) or said


def kernels_of(kernel: Any) -> list[Any]:
    """A kernel, and those for other sizes."""
    return [kernel, *kernel._others]


@pytest.mark.parametrize(
    "sizes", [((5, 3), (5, 7), (4, 7), (5, 9), (4, 3)), ((3, 3), (3, 7), (3, 3), (3, 9))]
)
def test_sizes_that_a_kernel_was_not_made_for_have_one_of_their_own(
    sizes: tuple[tuple[int, int], ...],
) -> None:
    """As many columns as the rank; and a table that has as many rows as the first weight, by chance."""

    def step(w: Tensor, g: Tensor, numbers: Tensor) -> None:
        w.add_(g * numbers.sum())

    kernel = Compiled(step)
    for turn in range(2):
        for entries, rows in sizes:
            w, g, numbers = normal(rows, ROW), normal(rows, ROW, seed=1), normal(entries, 2, seed=2).round()
            expected = w + g * numbers.sum()
            kernel(w, g, numbers)
            torch.testing.assert_close(w, expected, rtol=0, atol=1e-6)
            assert not vars(numbers)  # nothing is left on it
        for one in kernels_of(kernel) if not turn else ():
            assert one._order
            forbid_torch_compile(one)
    assert len(kernels_of(kernel)) == 2


def test_a_kernel_of_too_many_sizes_goes_by_the_public_call(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def step(w: Tensor, numbers: Tensor) -> None:
        w.add_(numbers.sum())

    monkeypatch.setattr(compiling, "VARIANTS", 1)
    private.say.cache_clear()
    caplog.set_level("DEBUG", logger=private.log.name)
    kernel = Compiled(step)
    for entries in (3, 4, 5, 3, 4, 5, 6):
        w = torch.zeros(7, ROW)
        kernel(w, torch.ones(entries))
        assert torch.equal(w, torch.full_like(w, entries))
    assert len(kernels_of(kernel)) == 2
    assert "too many sizes" in caplog.text


@pytest.fixture(params=["-mavx", "-mavx512vnni*|*-mavx512bf16"], ids=["all", "newest"])
def refusals(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A compiler that does not know some of the processor's instructions; the file of what it refused."""
    if request.param != "-mavx" and not torch.cpu._is_vnni_supported():
        pytest.skip("no instructions that could be refused")
    refused, wrapper = tmp_path / "refused", tmp_path / "g++"
    wrapper.write_text(
        f'#!/bin/sh\ncase "$*" in *{request.param}*) echo "$*" >> {refused}; exit 1;; esac\n'
        f'exec {config.cpp.cxx[1]} "$@"\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    forget_instructions()
    with config.patch({"cpp.cxx": (None, str(wrapper)), "cpp_cache_precompile_headers": False}):
        yield refused
    forget_instructions()  # what was found out about this compiler would be believed of the next one


@pytest.mark.skipif(
    "AVX" not in torch.backends.cpu.get_cpu_capability(), reason="no instructions that could be refused"
)
def test_a_compiler_older_than_the_processor_builds_without_its_instructions(
    refusals: Path, request: pytest.FixtureRequest
) -> None:
    fast, eager = Whole(compile=True), Whole()
    for rows in (3, 7):
        given = (CODES, "kahan", torch.bfloat16, rows, rows)
        for ours, theirs in zip(steps(fast, *given), steps(eager, *given), strict=True):
            assert torch.equal(ours, theirs)
        assert refusals.read_text()
        for kernel in fast._kernels.values():
            forbid_torch_compile(kernel)
    if request.node.callspec.id == "newest":
        assert pick_vec_isa().bit_width() == 512  # all that it does take


class RefusedOnce(Compiled):
    """What is left of the first attempt must not be called."""

    reason: Exception = CppCompileError(["g++"], "unknown instructions")
    attempts = 0

    def _build(self, graph: Any, inputs: Any) -> Any:
        self.attempts += 1
        if self.attempts == 2:
            return super()._build(graph, inputs)
        self._graphs.append(lambda _: pytest.fail("a graph of the failed attempt was called"))
        raise InductorError(self.reason, None)


def test_graphs_of_a_refused_attempt_are_not_called() -> None:
    kernel = RefusedOnce(add)
    assert_adds(kernel, ROW)
    assert kernel.attempts == 2


def test_an_error_that_is_not_the_compilers_is_not_tried_again() -> None:
    kernel = RefusedOnce(add)
    kernel.reason = ValueError("out of memory")
    with pytest.raises(InductorError, match="out of memory"):
        kernel(normal(3, ROW), normal(3, ROW))
    assert kernel.attempts == 1


@pytest.mark.parametrize("transposed", ["weight and gradient", "gradient"])
def test_compiled_chunks_of_one_row_are_read_in_order(transposed: str) -> None:
    """A row of a transposed gradient is strided, and generated code reads what follows in memory."""
    results = []
    for compile in ("on", "off"):
        start, g = normal(5, 5000), normal(5, 5000, seed=1)
        p = torch.nn.Parameter(start.t().contiguous().t() if transposed != "gradient" else start)
        p.grad = torch.nn.Parameter(g.t().contiguous().t()).detach()
        group = {"params": [("p", p)], "role": "matrix"}
        optimizer = lowmem.LowMemOptimizer([group], lowmem.create("adamw"), lr=1e-2, compile=compile)
        optimizer.step()
        optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)
