"""The frame around every command: discovery, error handling, a clean stdout.

Exit codes: 0 done; 2 the user can mend it, said in one line on stderr; 130 interrupted;
1 our fault, with the traceback. While a command runs, stdout belongs to `render.emit`:
whatever third parties print there goes to stderr, so that `--json` is one document.
"""

from __future__ import annotations

import atexit
import errno
import functools
import gc
import importlib
import logging
import os
import pkgutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from lowmem.errors import ConfigError, UserError, ran_out_of_room

from . import render

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else to stdout.")]

Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="MODULE",
        help="Module or file of your own that brings strategies; can be repeated.",
    ),
]

# Read when torch, datasets, transformers and huggingface_hub are imported; a value the user has set wins.
# The first: a thread that waits spins briefly, then sleeps. Spinning long costs a scheduler tick at every
# barrier of a busy machine; not spinning at all makes every step of a quiet one a third slower.
_ENVIRONMENT = {
    "GOMP_SPINCOUNT": "30000",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
# Of the machine, not of the program: a folder that may not be written, an impossible name.
_MENDABLE = {
    errno.EACCES,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}
_NOT_COMMANDS = {"app", "render"}
_HEADINGS = ("before", "after", "choices", "own")  # rooms, as `--help` shows them


class Guarded(TyperGroup):
    """The group of commands with lowmem's exit codes."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run one command; with `standalone_mode` leave with its exit code."""

        def run() -> Any:
            return super(Guarded, self).main(
                args, prog_name, complete_var, False, windows_expand_args, **extra
            )

        render.reopen()
        if not standalone_mode:
            return run()
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        atexit.register(gc.freeze)  # or the interpreter looks for cycles in all that was imported: 2 s
        return _leave(_exit_code(run))


def _exit_code(run: Callable[[], Any]) -> int:
    """Exit code of `run()`; errors are said on stderr."""
    try:
        code = run()
    except ConfigError as error:
        for problem in error.problems:
            render.error(problem)
        return 2
    except UserError as error:
        render.error(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `lowmem strategies | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:
        if ran_out_of_room(error) or error.errno not in _MENDABLE:
            return _usage_or_fault(error)
        render.error(f"{error.strerror}: {error.filename or 'while writing'}")
        return 2
    except Exception as error:
        return _usage_or_fault(error)
    return code if isinstance(code, int) else 0


def _usage_or_fault(error: Exception) -> int:
    """2 for a full disk and for an error of typer's own parser, 1 for anything unforeseen."""
    if line := ran_out_of_room(error):
        render.error(
            f"out of room: {line}; make room, or name another place (--output-dir; TMPDIR for temporary "
            "files, TORCHINDUCTOR_CACHE_DIR for compiled kernels)"
        )
        return 2
    message = getattr(error, "format_message", None)
    if message is None:
        sys.stderr.write(render.clean(traceback.format_exc()))
        return 1
    context = getattr(error, "ctx", None)
    if type(error).__name__ != "NoArgsIsHelpError":  # that one has printed the help already
        where = f"{context.command_path}: " if context is not None else ""
        render.error(f"{where}{_swallowed(context)}{' '.join(message().split())} (see --help)")
    return 2


def _swallowed(context: Any) -> str:
    """Which option took the next one as its value, as in `--solve --gpu 24GB`."""
    given = context.params.items() if context is not None else ()
    taken = [(name, value) for name, value in given if isinstance(value, str) and value.startswith("--")]
    return "".join(f"--{name.replace('_', '-')} needs a value, got {value!r}; " for name, value in taken)


@contextmanager
def _quiet_packages() -> Iterator[None]:
    """Show lowmem's own warnings as one line each; hide other packages' warnings and logs below error."""
    from lowmem.models.quiet import LOGGERS

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        render.warning(str(message))

    levels = {logging.getLogger(name): logging.getLogger(name).level for name in LOGGERS}
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module=r"lowmem(\.|$)")
            warnings.showwarning = show
        for logger in levels:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)


def _discover(target: typer.Typer, package: str, panel: str | None = None) -> None:
    """Register each module that has a `command` under its file name, those of a room under its heading."""
    modules = pkgutil.iter_modules(importlib.import_module(package).__path__)
    for module in sorted(modules, key=lambda m: (m.ispkg and _HEADINGS.index(m.name) + 1, m.name)):
        if module.name in _NOT_COMMANDS or module.name.startswith("_"):
            continue
        found = importlib.import_module(f"{package}.{module.name}")
        if module.ispkg:
            _discover(target, found.__name__, (found.__doc__ or module.name).partition(":")[0])
        elif (command := getattr(found, "command", None)) is not None:
            target.command(module.name.replace("_", "-"), rich_help_panel=panel)(_quiet(command))


def _quiet(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with stdout reserved for its result; typer's own help stays on stdout."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        with render.reserved_stdout(), _quiet_packages(), _parting():
            command(*args, **kwargs)

    return run


_joined = False
"""Whether this process was one of several."""


@contextmanager
def _parting() -> Iterator[None]:
    """Leave the other processes in order, if there are any."""
    global _joined
    try:
        yield
    finally:
        distributed = sys.modules.get("torch.distributed")
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            _joined = True
            distributed.destroy_process_group()


def _leave(code: int) -> NoReturn:
    """End the process; threads of a group may outlive it, and abort where the interpreter ends under them."""
    if not _joined:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        from lowmem import __version__

        render.out(f"lowmem {__version__}")
        raise typer.Exit()


app = typer.Typer(
    name="lowmem",
    cls=Guarded,
    help="Fine-tune language models in less memory, and know beforehand how much it takes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


_discover(app, __package__ or "lowmem.cli")
