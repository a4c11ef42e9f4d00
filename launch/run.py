"""`megaloom run RUN.yaml`: check everything, then train through the deepspeed launcher, here or on a hostfile's hosts.

Faults of the run, its data, the hostfile and the hosts are all told before any rank starts.
"""

import argparse
import re
import sys
from collections.abc import Sequence

from data_tools.training_data import check_data
from launch import report
from launch.backends import LAUNCHERS, Job, best_launcher, command_shown, launcher_fault
from launch.devices import device_type, num_gpus
from launch.hostfile import Host, chosen, name_fault, num_slots, read_hostfile
from launch.supervise import Options, Supervisor, newest_checkpoint
from model_providers.fp8.config import BACKENDS, RECIPES
from pretrain import run_lock
from pretrain.checkpoint.fit import check_before_start
from pretrain.checkpoint.store import write_whole
from pretrain.config_io import Run, find_deepspeed_json, load_run
from pretrain.config_rules import device_faults
from pretrain.disks import no_space
from pretrain.errors import RunError


def main(argv: list[str]) -> None:
    """Exit code 0 when all steps are done, or the state was saved at a signal; 130 when there was none to save."""
    words = parser().parse_intermixed_args(argv)
    words.words += fp8_words(words)
    hosts = hosts_of(words)
    wanted = [host for host in hosts if not host.is_spare]
    num_ranks = num_slots(wanted) if hosts else words.ranks or max(1, num_gpus())
    run = checked(
        words.run, words.words, num_ranks=num_ranks, deepspeed_config=words.deepspeed_config, hosts=wanted
    )
    if not words.dry_run:
        run_lock.check_free(run.folder)
    options = options_of(words, run, hosts, num_ranks)
    arguments = [words.run, *words.words]
    if words.deepspeed_config:
        arguments += ["--deepspeed_config", words.deepspeed_config]
    program = f"pretrain.{run.config.model.family}"
    if words.dry_run:
        address = options.address or (wanted[0].name if wanted else "127.0.0.1")
        job = Job(program, tuple(arguments), {}, tuple(wanted), num_ranks, address, options.port or 29500)
        print(command_shown(job, options.launcher, hostfile=words.hostfile))
        return
    ranks = "rank" if num_ranks == 1 else "ranks"
    if hosts:
        print(f"asking {len(hosts)} hosts whether they are fit", flush=True)
    else:
        print(f"starting {num_ranks} {ranks}: the libraries take their time", flush=True)
    supervisor = Supervisor(program, arguments, options, logs=run.folder / "logs")
    resume = ["checkpoint.resume=auto"] if run.config.checkpoint.resume != "auto" else []
    sys.exit(supervisor.run(lambda history: tell(run, history), resume))


def tell(run: Run, history: Sequence[report.Started]) -> None:
    """The one page into the run's folder, and onto the console what matters of it."""
    logs = run.folder / "logs"
    checkpoint = newest_checkpoint(run.checkpoints)
    text = report.page(
        run.config.name, history, num_steps=run.config.train.steps, checkpoint=checkpoint, logs=logs
    )
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        write_whole(run.folder / "report.txt", text)
    except OSError as fault:
        print(f"report.txt is not written: {no_space(fault, run.folder) or fault}", file=sys.stderr)
    failure = history[-1].outcome.failure
    assert failure is not None
    if len(history) > 1:
        print(f"\n{text}", file=sys.stderr)
    else:
        print(report.alone(failure, logs), file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(prog="megaloom run", description=__doc__, allow_abbrev=False)
    own.add_argument("run", help="run file (YAML), such as pretrain/runs/demo.yaml")
    own.add_argument(
        "words", nargs="*", metavar="key=value", help="overrides, such as train.steps=100 layout.tp=2"
    )
    own.add_argument(
        "--ranks", type=positive, help="processes on this machine (default: one per GPU, or one on a CPU)"
    )
    own.add_argument(
        "--deepspeed_config", metavar="FILE", help="DeepSpeed JSON; overrides the run file's `deepspeed`"
    )
    own.add_argument(
        "--dry-run", action="store_true", help="check, print the deepspeed command, start nothing"
    )
    add_fp8_words(own)
    add_host_words(own)
    kept = own.add_argument_group("supervision")
    kept.add_argument(
        "--restarts",
        type=not_negative,
        default=0,
        help="times to start again after a rank or a host has died",
    )
    kept.add_argument(
        "--pause", type=float, default=10.0, metavar="S", help="before the first restart; doubles with each"
    )
    kept.add_argument(
        "--stall-factor",
        type=float,
        default=10.0,
        metavar="K",
        help="without a step for K times the usual time, say which rank is late; end it after as long again; 0: never",
    )
    kept.add_argument(
        "--stall-floor", type=float, default=120.0, metavar="S", help="but after S seconds at the earliest"
    )
    return own


def add_fp8_words(own: argparse.ArgumentParser) -> None:
    own.add_argument(
        "--fp8", choices=RECIPES, metavar="RECIPE", help=f"of the run file's fp8.recipe: {', '.join(RECIPES)}"
    )
    own.add_argument(
        "--fp8-backend", choices=BACKENDS, metavar="NAME", help=f"fp8.backend: {', '.join(BACKENDS)}"
    )


def fp8_words(words: argparse.Namespace) -> list[str]:
    """The flags as the overrides that they stand for."""
    flags = {"fp8": ("recipe", words.fp8), "fp8-backend": ("backend", words.fp8_backend)}
    for flag, (name, value) in flags.items():
        twice = [word for word in words.words if word.partition("=")[0] in ("fp8", f"fp8.{name}")]
        if value and twice:
            raise RunError(
                f"--{flag} {value} with {twice[0]}: two words for one thing; leave one of them out"
            )
    return [f"fp8.{name}={value}" for name, value in flags.values() if value]


def add_host_words(own: argparse.ArgumentParser) -> None:
    """Where to run, in DeepSpeed's words."""
    many = own.add_argument_group("many hosts")
    many.add_argument("--hostfile", metavar="FILE", help="lines `HOST slots=N`; the word `spare` may follow")
    many.add_argument("--include", default="", metavar="SPEC", help="of the hostfile, such as a@b:0,2")
    many.add_argument("--exclude", default="", metavar="SPEC", help="of the hostfile, such as b:1")
    many.add_argument("--launcher", default="auto", metavar="NAME", help="auto, pdsh, ssh, openmpi or slurm")
    many.add_argument(
        "--master_addr", type=address, metavar="ADDRESS", help="of the first host, as the others see it"
    )
    many.add_argument("--master_port", type=port, metavar="PORT", help="a free one, if not given")
    many.add_argument(
        "--export",
        action="append",
        type=variable,
        default=[],
        metavar="NAME[=VALUE]",
        help="a variable for all ranks, beside NCCL_*, GLOO_*, UCX_*, OMP_*, TORCH*, PYTHON* and the like; give a "
        "secret by its NAME alone, since `ps` shows VALUE",
    )


def hosts_of(words: argparse.Namespace) -> tuple[Host, ...]:
    """The hosts that the words name, spares included; none for this machine alone."""
    if words.hostfile is None:
        for flag in ("include", "exclude"):
            if getattr(words, flag):
                raise RunError(
                    f"--{flag} {getattr(words, flag)}: chooses from a hostfile; give --hostfile FILE"
                )
        return ()
    if getattr(words, "ranks", None) is not None:
        raise RunError(
            f"--ranks {words.ranks} with --hostfile: the hostfile's slots are the ranks; leave --ranks out"
        )
    return chosen(read_hostfile(words.hostfile), include=words.include, exclude=words.exclude)


def options_of(words: argparse.Namespace, run: Run, hosts: tuple[Host, ...], num_ranks: int) -> Options:
    json_path = find_deepspeed_json(words.deepspeed_config or run.config.deepspeed)
    return Options(
        hosts=hosts,
        num_ranks=num_ranks,
        launcher=launcher_of(words, hosts, must_be_here=not words.dry_run),
        exports=tuple(words.export),
        address=words.master_addr,
        port=words.master_port,
        restarts=words.restarts,
        pause_s=words.pause,
        stall_factor=words.stall_factor,
        stall_floor_s=words.stall_floor,
        files=(words.run, str(json_path), *corpus_files(run)),
    )


def launcher_of(words: argparse.Namespace, hosts: Sequence[Host], *, must_be_here: bool = True) -> str:
    """The launcher that the words choose."""
    launcher = best_launcher() if words.launcher == "auto" else words.launcher
    fault = launcher_fault(launcher) if hosts or words.launcher != "auto" else None
    if fault is not None and (must_be_here or launcher not in LAUNCHERS):
        raise RunError(fault)
    return launcher


def corpus_files(run: Run) -> tuple[str, ...]:
    """The indices of all corpora: small, and different if the corpora are."""
    data = run.config.data
    named = [*data.train, *(part for parts in data.validation.values() for part in parts)]
    return tuple(dict.fromkeys(f"{part.path}.idx" for part in named))


def port(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{number}: a port is 1 to 65535")
    return number


def address(text: str) -> str:
    wrong = name_fault(text)
    if wrong is not None:
        raise argparse.ArgumentTypeError(wrong)
    return text.strip("[]")


def variable(text: str) -> str:
    name = text.partition("=")[0]
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise argparse.ArgumentTypeError(f"{name}: no name of a variable; letters, digits and _ make one")
    return text


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: give 1 or more")
    return number


def not_negative(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number}: give 0 or more")
    return number


def checked(
    path: str,
    words: list[str],
    *,
    num_ranks: int,
    deepspeed_config: str | None = None,
    hosts: Sequence[Host] = (),
    goes_on: bool = True,
) -> Run:
    """The run, if nothing speaks against it; all faults at once otherwise, before any process starts.

    ``goes_on``: from the checkpoint that it finds, or with the weights that it names.
    """
    run = load_run(path, words, world_size=num_ranks, deepspeed_config=deepspeed_config)
    faults = [] if hosts else here_faults(run, num_ranks)
    if run.layout.dispatcher == "hierarchical" and len(hosts) < 2:
        faults.append(
            "layout.dispatcher=hierarchical: all ranks are on one machine, which has no inside; use alltoall here, and "
            "hierarchical with a --hostfile of several hosts"
        )
    if faults:
        raise RunError("\n".join(faults))
    data = check_data(run.config.data)
    if goes_on:
        check_before_start(run, data)
    return run


def here_faults(run: Run, num_ranks: int) -> list[str]:
    """What this machine lacks."""
    faults = device_faults(run, device_type())
    if device_type() == "cuda" and num_ranks > num_gpus():
        faults.append(
            f"--ranks {num_ranks}: this machine has {num_gpus()} GPUs; start at most one rank on each"
        )
    return faults
