"""Pages that the code writes when the site is built: each method, what goes with what, and llms.txt."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SHAPE = (4096, 11008)
PRECISIONS = ("fp32", "bf16", "int8", "int4", "companded8")
SETTINGS: dict[str, dict[str, Any]] = {
    "gradient release": {"gradient_release": True},
    "release with accumulation": {"gradient_release": True, "gradient_accumulation_steps": 4},
    "activation checkpointing": {"activation_checkpointing": True},
    "clipping": {"clip": "global", "max_grad_norm": 1.0},
    "fp16 with loss scaling": {"fp16": True},
    "FSDP2": {"fsdp": True},
    "low-rank exchange of copies": {"gradient_sync": "low_rank", "clip": "none"},
}


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to those in the folder."""
    from mkdocs.structure.files import File

    for path, text in generated():
        files.append(File.generated(config, path, content=text))
    return files


def on_post_build(config: Any) -> None:
    """Leave llms.txt beside the pages."""
    Path(config["site_dir"], "llms.txt").write_text(llms(Path(config["docs_dir"])), encoding="utf-8")


def generated() -> Iterator[tuple[str, str]]:
    """Paths of the generated pages, and their text."""
    import lowmem

    entries = lowmem.available()
    yield "methods/index.md", _index(entries)
    for name, entry in entries.items():
        yield f"methods/{name}.md", method(entry)
    yield "support.md", support()


def _index(entries: dict[str, Any]) -> str:
    families: dict[str, list[Any]] = {}
    for entry in entries.values():
        families.setdefault(entry.family, []).append(entry)
    lines = [
        "# Methods",
        "",
        f"State bytes for each element of a {SHAPE[0]} x {SHAPE[1]} bfloat16 weight, by default.",
        "",
    ]
    for family, found in sorted(families.items()):
        lines += [f"## {family}", "", "| method | what it does | bytes |", "|---|---|---|"]
        lines += [f"| [{e.name}]({e.name}.md) | {e.summary} | {_held(e.name):.3g} |" for e in found]
        lines.append("")
    return "\n".join(lines)


def _held(name: str, **options: Any) -> float:
    import torch

    import lowmem

    return lowmem.state_bytes(lowmem.create(name, **options), SHAPE, torch.bfloat16) / (SHAPE[0] * SHAPE[1])


def method(entry: Any) -> str:
    """The page of one method: what its record and its parts say."""
    summary, _, doc = entry.doc.partition("\n")
    lines = [f"# {entry.name}", "", summary, "", _blocks(doc), ""]
    lines += [f"Paper: [arXiv {entry.paper}](https://arxiv.org/abs/{entry.paper})", ""]
    lines += ["```bash", f"lowmem finetune --model MODEL --optim {entry.name} --data FILE", "```", ""]
    lines += [*_advice(entry), *_measured(entry)]
    lines += [f"## State of a {SHAPE[0]} x {SHAPE[1]} bfloat16 weight", "", *_precisions(entry), ""]
    lines += ["## Options", "", "| option | values | default | |", "|---|---|---|---|"]
    lines += [_option(option) for option in entry.options.values()]
    return "\n".join(lines) + "\n"


def _advice(entry: Any) -> list[str]:
    if not entry.recommended:
        return []
    rows = [f"| {advice.purpose} | `{advice}` | {advice.source} |" for advice in entry.recommended]
    return ["## Recommended", "", "| for | values | by |", "|---|---|---|", *rows, ""]


def _measured(entry: Any) -> list[str]:
    from lowmem.report.quality import TOLD, measured, told

    if not (found := measured(entry.name)):
        return []
    head = ["## Measured", "", f"| {' | '.join(TOLD)} |", "|---|---|---|---|"]
    rows = [f"| {' | '.join(told(row))} |" for row in found]
    return [*head, *rows, "", "All methods, and how their rates were chosen: [quality](../quality.md).", ""]


def _blocks(doc: str) -> str:
    """Indented equations stay code; docstrings are Markdown otherwise."""
    return doc.strip("\n").replace("<-", "&lt;-") if "    " not in doc else doc.strip("\n")


def _precisions(entry: Any) -> list[str]:
    if "states" not in entry.options:
        return [f"{_held(entry.name):.3g} bytes for each element."]
    default = entry.options["states"].default
    lines = ["| states | bytes for each element |", "|---|---|"]
    for word in PRECISIONS:
        told = " (default)" if word == default else ""
        lines.append(
            f"| `{word}`{told} | {_refused(lambda word=word: f'{_held(entry.name, states=word):.3g}')} |"
        )
    return lines


def _refused(made: Callable[[], str]) -> str:
    from lowmem.errors import UserError

    try:
        return made()
    except UserError as error:
        return f"refused: {error}".replace("|", "\\|")


def _option(option: Any) -> str:
    values = (
        " \\| ".join(f"`{choice}`" for choice in option.choices) if option.choices else option.type.__name__
    )
    default = "as `states`" if option.default == "" else f"`{option.default}`"
    return f"| `{option.name}` | {values} | {default} | {option.help} |"


def support() -> str:
    """What goes with what: every cell is what the trainer's arguments say to that combination."""
    import lowmem

    lines = [
        "# What goes with what",
        "",
        "Every cell is the answer of the trainer's arguments to that combination, asked when this page "
        "was built. All methods take float32 and bfloat16 weights and adapters of PEFT, and resume exactly; "
        "none was measured on a GPU yet.",
        "",
        "| method | " + " | ".join(SETTINGS) + " |",
        "|---|" + "---|" * len(SETTINGS),
    ]
    said: dict[str, int] = {}
    for name in lowmem.available():
        cells = [_cell(name, settings, said) for settings in SETTINGS.values()]
        lines.append(f"| [{name}](methods/{name}.md) | " + " | ".join(cells) + " |")
    lines += ["", "## Why not", ""]
    lines += [f"{number}. {text}" for text, number in said.items()]
    return "\n".join(lines) + "\n"


def _cell(name: str, settings: dict[str, Any], said: dict[str, int]) -> str:
    problems = refusals(name, settings)
    if not problems:
        return "yes"
    texts = [re.sub(rf"\b{name}\b", "the method", problem) for problem in problems]
    return "no (" + ", ".join(str(said.setdefault(text, len(said) + 1)) for text in texts) + ")"


def refusals(name: str, settings: dict[str, Any]) -> list[str]:
    """What the arguments say against a method with these settings."""
    import lowmem

    common = {
        "output_dir": "out",
        "optim": name,
        "use_cpu": True,
        "report_to": "none",
        "activation_checkpointing": False,
    }
    try:
        lowmem.LowMemArguments(
            **{**common, "clip": "none" if "gradient_release" in settings else "auto", **settings}
        )
    except lowmem.ConfigError as error:
        return list(error.problems)
    return []


def llms(folder: Path) -> str:
    """The pages that were written by hand, one after another, and the table of methods."""
    import lowmem

    order = ["index.md", "start.md", *sorted(f"guides/{p.name}" for p in (folder / "guides").glob("*.md"))]
    texts = [(folder / name).read_text(encoding="utf-8") for name in order]
    table = "\n".join(f"- {e.name}: {e.summary} (arXiv {e.paper})" for e in lowmem.available().values())
    return "\n\n".join([*texts, f"# Methods\n\n{table}"]) + "\n"


if __name__ == "__main__":
    wanted = dict(generated())
    sys.stdout.write(wanted[sys.argv[1]] if sys.argv[1:] else "\n".join(wanted) + "\n")
