"""The registry: parts and methods as they are told, options typed, and nothing silently ignored."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import Any

import pytest
import torch

import lowmem
from lowmem.errors import CheckpointError, UserError
from lowmem.optim.elementwise import coded
from lowmem.optim.rules.compact.microadam import MicroAdam
from lowmem.optim.rules.elementwise.adam import Adam
from lowmem.optim.rules.elementwise.sgd import SGD
from lowmem.optim.strategy import Strategy
from lowmem.optim.writers import Kahan
from lowmem.sources import Backprop
from lowmem.strategies import Method, parse_options, part, parts, register
from lowmem.strategies.compose import fixed
from lowmem.strategies.parts import KINDS
from lowmem.training.contract import zoo
from tests.contract import cases
from tests.contract.cases import Case


def entries() -> list[tuple[str, Any]]:
    return list(lowmem.available().items())


def every_option() -> list[tuple[str, Any]]:
    """Those of parts, once, and those that methods list."""
    of_parts = [
        (f"{kind}={name}", o) for kind in KINDS for name, p in parts(kind).items() for o in p.options.values()
    ]
    return of_parts + [(name, o) for name, entry in entries() for o in entry.options.values()]


@pytest.mark.parametrize(("name", "entry"), entries())
def test_an_entry_says_what_it_is(name: str, entry: Any) -> None:
    assert entry.name == name
    assert len(entry.summary.splitlines()) == 1
    assert "Bytes for" in entry.doc
    assert all(option.name == key for key, option in entry.options.items())
    assert set(cases.AXES) == set(entry.axes)


@pytest.mark.parametrize(("owner", "option"), every_option(), ids=str)
def test_an_option_is_told_in_full(owner: str, option: Any) -> None:
    assert option.type in (int, float, str, bool)
    assert option.help
    if option.choices is None:
        assert option.checked(option.default) == option.default
    elif option.default:
        assert set(str(option.default).split("+")) <= {*option.choices}  # modifiers are several
    if option.limits.small is not None:
        assert option.checked(option.limits.small) == option.limits.small


@pytest.mark.parametrize("composition", [*cases.choose("changed"), *cases.drawn()[::5]], ids=str)
def test_a_strategy_comes_back_from_its_options(composition: Case) -> None:
    strategy = composition.create()
    config = json.loads(json.dumps(strategy.to_config()))
    again = lowmem.create(config["name"], **config["options"])
    assert again == strategy
    assert hash(again) == hash(strategy)
    assert again.to_config() == strategy.to_config()
    text = ",".join(
        f"{key}={str(v).lower() if isinstance(v, bool) else v}" for key, v in strategy.options.items()
    )
    assert parse_options(composition.name, text) == strategy.options
    for one in (pickle.loads(pickle.dumps(strategy)), copy.deepcopy(strategy)):
        assert one == strategy
        assert one.to_config() == strategy.to_config()


def by_hand(scale: float = 1.0) -> Strategy:
    return Strategy(rules={"matrix": coded(SGD(scale)), "other": coded(Adam())}, source=Backprop())


def test_a_strategy_without_a_name_is_its_own_key() -> None:
    assert by_hand() == by_hand()
    assert hash(by_hand()) == hash(by_hand())
    assert by_hand() != by_hand(0.5)
    assert by_hand().to_config() == by_hand().to_config() != by_hand(0.5).to_config()
    assert "scale=0.5" in by_hand(0.5).to_config()["parts"]
    assert pickle.loads(pickle.dumps(by_hand())).to_config() == by_hand().to_config()


def test_a_strategy_that_was_changed_loses_its_name() -> None:
    named = lowmem.create("galore", rank=4)
    other = dataclasses.replace(named, writer=Kahan())
    assert (other.name, dict(other.options)) == ("", {})
    assert other == lowmem.create("galore", rank=4, writer="kahan")
    assert other.to_config() != named.to_config()


def test_equal_rules_are_one_object() -> None:
    strategy = Strategy(rules={"matrix": MicroAdam(), "other": MicroAdam()}, source=Backprop())
    assert strategy.rules["matrix"] is strategy.rules["other"]


@pytest.mark.parametrize(
    ("dtype", "words"), [(torch.float16, "writer 'split' holds bf16"), (torch.complex64, "view_as_real")]
)
def test_weights_that_a_writer_cannot_take_are_refused_at_once(dtype: torch.dtype, words: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=dtype))
    with pytest.raises(UserError, match=words):
        lowmem.LowMemOptimizer([weight], lowmem.create("adamw", writer="split"))


def said(name: str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        lowmem.create(name, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("name", [name for name, _ in entries()])
def test_a_misspelt_option_is_an_error_with_the_nearest_name(name: str) -> None:
    for key, option in lowmem.available()[name].options.items():
        assert f"did you mean {key!r}" in said(name, **{key + "q": option.default})


def test_an_unknown_strategy_is_an_error_with_the_nearest_name() -> None:
    for name, _ in entries():
        assert name in said(name + "x")


def bad_values() -> list[tuple[str, str, Any]]:
    found: list[tuple[str, str, Any]] = []
    for name, entry in entries():
        for key, option in entry.options.items():
            bad: list[Any] = [[], "nonsense"] if option.type is not str or option.choices else []
            if option.type is float:
                bad += [float("nan"), float("inf")]
            if option.limits.size:
                bad += [0, -1, 1.5, 0.0]
            limits = option.limits
            bad += [edge for edge in (limits.above, limits.below) if edge is not None]
            bad += [limits.least - 1] if limits.least is not None else []
            bad += [limits.most + 1] if limits.most is not None else []
            found += [(name, key, value) for value in bad]
    return found


@pytest.mark.parametrize("name", [name for name, _ in entries()])
def test_a_bad_value_is_one_line_that_names_the_option(name: str) -> None:
    for _, key, value in (one for one in bad_values() if one[0] == name):
        assert key in said(name, **{key: value}), (key, value)


IMPOSSIBLE: list[tuple[str, dict[str, Any], str]] = [
    (
        "adamw",
        {"rank": 4},
        r"rank comes with projector=\S*power\S* or rule=\S*mlorc\S* or source=low_rank_spsa; choose that, or",
    ),
    ("adamw", {"scale": 0.5}, "scale comes with a projector; choose one"),
    ("adamw", {"on_refresh": "reset"}, "on_refresh comes with a projector; choose one"),
    ("adamw", {"residual": "sign"}, "nothing to step by where everything is seen; choose a projector"),
    ("adamw", {"window": 3}, "window comes with rule=microadam"),
    ("adamw", {"queries": 3}, r"queries comes with source=\S*spsa"),
    ("adamw", {"density": 0.5}, r"density comes with rule=microadam or schedule=\S*blocks"),
    ("adamw", {"residual_scale": 0.5}, r"residual_scale comes with residual=\S*sign"),
    ("adamw", {"rule": "sgd", "states": "int8"}, "rule sgd holds no moments; leave states out"),
    ("mezo", {"states": "bf16"}, "rule sgd holds no moments; leave states out"),
    (
        "galore",
        {"embedding": "sgd", "embedding_states": "int8"},
        "sgd holds no moments; leave embedding_states",
    ),
    ("galore", {"projector": "columns", "proj_type": "left"}, r"proj_type comes with projector=\S*svd"),
    (
        "galore",
        {"projector": "columns", "on_refresh": "rotate"},
        "needs a dense basis; leave on_refresh out",
    ),
    ("galore", {"states": "int8", "on_refresh": "rotate"}, "needs states='fp32'; take states='fp32'"),
    ("galore", {"rule": "adafactor", "on_refresh": "rotate"}, "not defined .*; take 'reset' or 'keep'"),
    ("galore", {"rule": "microadam"}, "not defined for a window of gradients; take"),
    ("galore", {"rank": 1.5}, "a whole number from 1 on, or a share between 0 and 1, got 1.5"),
    ("galore", {"rank": 4, "projector_rank": 8}, "rank and projector_rank are the same; give one of them"),
    ("fira", {"schedule": "blocks"}, "cannot step what schedule=blocks puts aside; take residual=drop"),
    ("apollo", {"scale": 0.5}, "lifts nothing that scale is of; take residual_scale"),
    ("fira", {"projector": "columns"}, "the residual needs a projector with dense"),
    ("galore", {"modifiers": "nonesuch"}, "unknown modifiers 'nonesuch'; .*Known: "),
    ("galore", {"embedding_modifiers": "nonesuch"}, "unknown embedding_modifiers 'nonesuch'"),
    ("adafactor", {"warmup": 10}, "warmup=10 needs relative_step=true"),
    ("adafactor", {"eps2": 0.1}, "eps2=0.1 needs scale_parameter=true"),
]


@pytest.mark.parametrize(("name", "options", "words"), IMPOSSIBLE, ids=str)
def test_what_is_impossible_says_so_in_one_line_with_the_remedy(
    name: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        lowmem.create(name, **options)
    assert said(name, **options).startswith(f"{name}: ")


def test_all_problems_are_told_at_once() -> None:
    message = said(
        "galore", projector="colums", rnk=3, update_proj_gap=0, states="int7", head="lionn", writer="auto",
        warmup=3, on_refresh="rotate",
    )  # fmt: skip
    for words in (
        "'columns'",
        "'rnk'",
        "update_proj_gap must be",
        "'int7'",
        "head",
        "writer",
        "rule=adafactor",
    ):
        assert words in message, words
    both = said("galore", rank=0, on_refresh="rotate", states="int8")
    assert "rank is a whole number" in both
    assert "needs states='fp32'" in both


def test_a_name_that_two_parts_share_is_written_with_its_axis() -> None:
    both: dict[str, Any] = {"rule": "microadam", "schedule": "blocks", "residual": "sign"}
    assert "write rule_density or schedule_density" in said("adamw", **both, density=0.5)
    made = lowmem.create("adamw", **both, rule_density=0.5, schedule_density=0.125)
    assert made.options["rule_density"] == 0.5
    assert made.options["schedule_density"] == 0.125
    assert "density" not in made.options
    assert lowmem.create("adamw", **made.options) == made


def test_a_default_follows_its_axis_to_another_part() -> None:
    assert lowmem.create("frugal", projector="svd").options["rank"] == 0.25
    assert lowmem.create("galore", projector="columns").options["rank"] == 128
    assert "rank" not in lowmem.create("galore", projector="none").options


def test_a_long_name_is_always_allowed() -> None:
    assert lowmem.create("galore", projector_rank=4) == lowmem.create("galore", rank=4)


def test_roles_take_rules_precision_and_options_of_their_own() -> None:
    made = lowmem.create(
        "galore", embedding="adafactor", embedding_beta1=0.5, head_states="int8", vector="sgd"
    )
    assert made.rules["vector"] == coded(SGD())
    assert made.rules["head"] == coded(Adam(), "int8")
    assert made.rules["other"] == coded(Adam())
    assert made.rules["embedding"] != lowmem.create("galore", embedding="adafactor").rules["embedding"]
    assert lowmem.create("galore", **made.options) == made


def test_a_composition_is_the_same_as_text_as_a_configuration_and_in_python() -> None:
    text = "projector=dct,rule=lion,states=int8,residual=sign,modifiers=cautious+limit,embedding=adafactor"
    words = dict(word.split("=") for word in text.split(","))
    made = lowmem.create("galore", **words)
    assert lowmem.create("galore", **parse_options("galore", text)) == made
    assert lowmem.create("galore", **made.options) == made
    assert {key: made.options[key] for key in words} == words
    assert made.rules["matrix"] != made.rules["embedding"]


def test_an_option_given_twice_is_an_error() -> None:
    with pytest.raises(UserError, match="given twice"):
        parse_options("galore", "rank=1, rank=2")


def test_an_optimizer_takes_a_strategy() -> None:
    strategy = lowmem.create("galore", rank=4)
    model = zoo.build()
    assert lowmem.optimizer(model, strategy).strategy is strategy
    assert lowmem.optimizer(model, by_hand()).strategy == by_hand()
    with pytest.raises(UserError, match=r"rank: a strategy that was made has its options; .*lowmem.create"):
        lowmem.optimizer(model, strategy, rank=8)


def test_a_record_with_a_default_that_nothing_has_is_the_programmers_mistake() -> None:
    with pytest.raises(ValueError, match="no chosen part of 'm' has an option 'rnk'"):
        fixed(Method("m", "It does.", paper="", rule="adam", rnk=4))
    with pytest.raises(ValueError, match="needs a rule"):
        Method("m", "It does.", paper="", projector="power")
    with pytest.raises(ValueError, match="registered twice"):
        register(Method("galore", "It does.", paper="", rule="adam"))


def test_a_part_must_say_what_it_is() -> None:
    def silent(*, a: int = 1) -> None: ...

    def twice() -> None:
        """It does."""

    def telling(*, a: int = 1) -> None:
        """It does."""

    with pytest.raises(ValueError, match="not 'gadget'"):
        part("gadget")
    with pytest.raises(ValueError, match="needs a docstring"):
        part("rule")(silent)
    with pytest.raises(ValueError, match="needs a plain type, a default and a help line"):
        part("rule")(telling)
    with pytest.raises(ValueError, match="'adam' is registered twice"):
        part("rule", "adam")(twice)


def test_a_moment_may_have_a_precision_of_its_own() -> None:
    made = lowmem.create("adamw", states="int8", exp_avg_sq_states="bf16")
    assert made.rules["matrix"] == coded(Adam(), {"exp_avg": "int8", "exp_avg_sq": "bf16"})
    assert made.rules["small"] == coded(Adam(), {"exp_avg": "fp32", "exp_avg_sq": "bf16"})
    assert lowmem.create("adamw", **made.options) == made
    assert "rule=adafactor holds no exp_avg" in said("adafactor", exp_avg_states="bf16")


def test_a_strategy_without_a_name_is_planned_and_resumed() -> None:
    planned = lowmem.plan("smollm2-135m", [by_hand(), lowmem.create("adamw")], seq_len=64).plans
    assert [row.strategy for row in planned] == ["custom", "adamw"]
    assert planned[0].state_bytes < planned[1].state_bytes
    saved = lowmem.optimizer(zoo.build(), by_hand()).state_dict()
    lowmem.optimizer(zoo.build(), by_hand()).load_state_dict(saved)
    with pytest.raises(CheckpointError, match=r"scale=0\.5"):
        lowmem.optimizer(zoo.build(), by_hand(0.5)).load_state_dict(saved)
