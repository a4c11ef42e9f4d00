"""What all programs that the `deepspeed` launcher starts have in common: their words, and how a mistake is told.

The launcher puts ``--local_rank=N`` first; the variable LOCAL_RANK says the same.
"""

import argparse
import atexit
import importlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from data_tools.errors import DataError
from model_providers.errors import ModelError
from pretrain.config_io import Run, load_run
from pretrain.disks import no_space
from pretrain.errors import RunError

USAGE_EXIT_CODE = 2
FIRST_RANK_S = 1.0  # what other ranks leave it to tell a mistake that all have met


def rank_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=name, description=description, allow_abbrev=False)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser


def add_run_words(parser: argparse.ArgumentParser) -> None:
    """RUN.yaml, ``key=value`` words and a DeepSpeed JSON: what `load_on_rank` reads."""
    parser.add_argument("run", help="run file (YAML)")
    parser.add_argument("words", nargs="*", metavar="key=value", help="overrides of the run file")
    parser.add_argument(
        "--deepspeed_config", metavar="FILE", help="DeepSpeed JSON; overrides the run file's `deepspeed`"
    )


def load_on_rank(words: argparse.Namespace) -> Run:
    """The run that the words name, for the world that the launcher made."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return load_run(words.run, words.words, world_size=world_size, deepspeed_config=words.deepspeed_config)


def run_program(name: str, description: str | None, argv: list[str] | None) -> int:
    """Train the run that the words name, on this rank."""
    parser = rank_parser(name, description)
    add_run_words(parser)
    words = parser.parse_intermixed_args(argv)

    def work() -> None:
        run = load_on_rank(words)
        importlib.import_module("model_providers.late_compile")  # before megatron-core
        from pretrain.engine.groups import leave  # torch and the libraries, after the words were read
        from pretrain.run import train

        train(run)
        leave()

    return exit_code(name, work)


def end_process(code: int) -> NoReturn:
    """End this rank with ``code``, without the interpreter's own end.

    Python would free 3,000 modules one object at a time before it ends: 0.7 s in which nothing happens that the system
    does not do itself.  What does matter is done before: files and groups are closed by the program, and the functions
    of `atexit` run here (logging, monitors).  A thread that Python would wait for is waited for in Python's own way.
    """
    if all(thread.daemon or thread is threading.main_thread() for thread in threading.enumerate()):
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def exit_code(name: str, work: Callable[[], object]) -> int:
    """0 when ``work`` is done; 2 on a user's mistake, with one line from every rank that met it.

    The launcher shows a line once that many ranks say, and ends all ranks when one has ended: so the first rank, whose
    output every launcher shows, goes first.
    """
    try:
        work()
    except (RunError, ModelError, DataError) as mistake:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(FIRST_RANK_S)
        print(f"{name}: {mistake}", file=sys.stderr, flush=True)
        return USAGE_EXIT_CODE
    except Exception as fault:
        full = no_space(fault)
        if full is None:
            raise
        print(f"{name}: rank {os.environ.get('RANK', '0')}: {full}", file=sys.stderr)
        return USAGE_EXIT_CODE
    return 0
