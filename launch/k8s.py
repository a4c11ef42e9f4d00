"""`megaloom k8s RUN.yaml`: check a run, and write a manifest for Kubernetes that a person can read and change.

An Indexed Job and a headless Service are all it takes, no operator: the Service gives each pod a name, the Job gives
it its number, and DeepSpeed's launcher starts the pod's ranks.  An index of such a Job is done for ever when its pod
ends with 0, so those of a run that was stopped and saved must not: they end with a code that the Job does not count,
and come again.
"""

import argparse
import re
import sys
from pathlib import Path

import yaml

from launch.backends import KEEPER
from launch.env import KEEPER_LOGS, LAUNCH_ID
from launch.run import not_negative, positive
from launch.scheduled import Scheduled, add_common_words, deliver, scheduled, shell
from pretrain.config_io import find_deepspeed_json
from pretrain.ds_config import read_json
from pretrain.errors import RunError
from pretrain.redaction import secret_keys

NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")  # RFC 1035, as a Service's name must be
LONGEST_NAME = 52  # a pod's host name is NAME-INDEX, of 63 letters at most
QUANTITY = re.compile(r"\d+(Mi|Gi|Ti)")
STOPPED = 75  # EX_TEMPFAIL: saved, and not done
FILES = "/megaloom"  # where the ConfigMap's files are in a pod
BLOCK_ENDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff]")
PORT = 29500  # each pod has its own address, so nobody else listens there


def main(argv: list[str]) -> None:
    words = parser().parse_intermixed_args(argv)
    check_words(words)
    job = scheduled(words)
    check_paths(job, words.folder)
    check_secrets(job, words)
    deliver(manifest(job, words), words.out, f"kubectl apply -f {words.out}")


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(prog="megaloom k8s", description=__doc__, allow_abbrev=False)
    add_common_words(own, unit="pods, each a machine's share of the job")
    own.add_argument("--image", required=True, help="with Python, Megaloom and its packages")
    own.add_argument(
        "--claim", required=True, metavar="NAME", help="PersistentVolumeClaim with corpora and room for runs"
    )
    own.add_argument(
        "--folder",
        default="/workspace",
        help="where that is in a pod; paths of the run file begin there (default: /workspace)",
    )
    own.add_argument("--name", help="of the job (default: the run's, in letters that Kubernetes takes)")
    own.add_argument("--namespace", metavar="NAME", help="(default: kubectl's)")
    own.add_argument("--shm", default="16Gi", metavar="SIZE", help="shared memory of a pod (default: 16Gi)")
    own.add_argument(
        "--retries",
        type=not_negative,
        default=3,
        metavar="N",
        help="times that all pods may fail (default: 3)",
    )
    own.add_argument("--port", type=positive, default=PORT, help=f"where ranks meet (default: {PORT})")
    return own


def check_paths(job: Scheduled, folder: str) -> None:
    """What is outside the volume is another file in each pod, or none, and is lost with the pod."""
    config = job.run.config
    corpora = [*config.data.train, *(part for parts in config.data.validation.values() for part in parts)]
    paths = {"out": config.out}
    paths |= {f"data: {part.path}": part.path for part in corpora}
    outside = [
        f"{name}={path}" if name == "out" else name
        for name, path in paths.items()
        if path.startswith("/") and not Path(path).is_relative_to(folder)
    ]
    if outside:
        print(
            f"warning: {', '.join(outside)}: not below --folder {folder}, the volume; use relative paths, name "
            "the folder under which they lie in the pods, or mount another volume there",
            file=sys.stderr,
        )


def check_secrets(job: Scheduled, words: argparse.Namespace) -> None:
    """The manifest holds the user's DeepSpeed JSON, and is no place for a key."""
    own = _own_json(job, words)
    keys = secret_keys(read_json(own)) if own is not None else []
    if keys:
        section, _, key = keys[0].rpartition(".")
        raise RunError(
            f"{', '.join(keys)} in {own}: would be in the manifest for all to read; leave it out, and give the pods "
            f"{section.upper()}_{key.upper()} from a Secret (env, valueFrom.secretKeyRef)"
        )


def check_words(words: argparse.Namespace) -> None:
    """All that Kubernetes would refuse later, in its own words."""
    faults = []
    for key in ("name", "namespace", "claim"):
        name = getattr(words, key)
        if name is not None and (not NAME.fullmatch(name) or len(name) > LONGEST_NAME):
            faults.append(
                f"--{key} {name}: give at most {LONGEST_NAME} small letters, digits and hyphens, a letter first"
            )
    if not QUANTITY.fullmatch(words.shm):
        faults.append(
            f"--shm {words.shm}: not an amount of memory; write a number and Mi or Gi, such as 16Gi"
        )
    if not words.folder.startswith("/"):
        faults.append(f"--folder {words.folder}: a path in the pod begins with /, such as /workspace")
    if faults:
        raise RunError("\n".join(faults))


def name_of(run: str) -> str:
    """A run's name in letters that Kubernetes takes."""
    name = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    return (name if name[:1].isalpha() else f"run-{name}")[:LONGEST_NAME].rstrip("-")


def manifest(job: Scheduled, words: argparse.Namespace) -> str:
    name = words.name or name_of(job.name)
    namespace = f"\n  namespace: {words.namespace}" if words.namespace else ""
    gpus = ""
    if job.on_gpus:
        gpus = (
            f"\n          resources:\n            limits:\n              nvidia.com/gpu: {job.ranks_per_node}"
        )
    pods = "1 pod" if job.num_nodes == 1 else f"{job.num_nodes} pods"
    ranks = "1 rank" if job.ranks_per_node == 1 else f"{job.ranks_per_node} ranks"
    return f"""# Trains {job.name} ({job.path}) on {pods} with {ranks} each.
# Written by `megaloom k8s`; yours to change.  Rank 0 speaks in:  kubectl logs -f job/{name}

# The run file, and the hosts as DeepSpeed's launcher wants them.
apiVersion: v1
kind: ConfigMap
metadata:
  name: {name}{namespace}
data:
{_indented(_files(job, words, name), 2)}
---
# No address of its own: it gives pod number I the name {name}-I.{name}.
apiVersion: v1
kind: Service
metadata:
  name: {name}{namespace}
spec:
  clusterIP: None
  publishNotReadyAddresses: true  # ranks look for each other while pods start
  selector:
    job-name: {name}
---
apiVersion: batch/v1
kind: Job
metadata:
  name: {name}{namespace}
spec:
  completionMode: Indexed  # each pod finds its number in JOB_COMPLETION_INDEX
  completions: {job.num_nodes}
  parallelism: {job.num_nodes}
  backoffLimit: {words.retries * job.num_nodes}  # when one pod fails, all do: {words.retries} times {job.num_nodes}
  podFailurePolicy:
    rules:
      - action: Ignore  # a run that was asked to stop and has saved itself: its pods come again, uncounted
        onExitCodes:
          operator: In
          values: [{STOPPED}]
      - action: Ignore  # so do those of a machine that is drained
        onPodConditions:
          - type: DisruptionTarget
  template:
    spec:
      subdomain: {name}
      restartPolicy: Never
      terminationGracePeriodSeconds: {max(1, words.save_before)}  # what a run gets to save itself
      containers:
        - name: ranks
          image: {_word(words.image)}
          workingDir: {_word(words.folder)}
          env:
            - name: {KEEPER_LOGS}  # each rank's log
              value: {_word(str(Path(words.folder) / job.run.folder / "logs"))}
            - name: {LAUNCH_ID}  # by which the ranks are found when the pod is asked to end
              value: {name}{_accelerator(job)}
          command: [bash, -c]
          args:
            - |
{_indented(command(job, words, name), 14)}
          lifecycle:
            preStop:  # before a pod is ended, its ranks finish their step and save; this waits until they have
              exec:
                command: [bash, -c, "python -m launch.processes ${LAUNCH_ID} stop; tail --pid=1 -f /dev/null"]{gpus}
          volumeMounts:
            - name: workspace
              mountPath: {_word(words.folder)}
            - name: files
              mountPath: {FILES}
            - name: shared-memory
              mountPath: /dev/shm
      volumes:
        - name: workspace
          persistentVolumeClaim:
            claimName: {words.claim}
        - name: files
          configMap:
            name: {name}
        - name: shared-memory  # NCCL's and the data's; a container has 64 MiB otherwise
          emptyDir:
            medium: Memory
            sizeLimit: {words.shm}
"""


def command(job: Scheduled, words: argparse.Namespace, name: str) -> str:
    """What a pod's bash does."""
    chosen = ["--deepspeed_config", f"{FILES}/deepspeed.json"] if _own_json(job, words) else []
    _, plain, program, path, *overrides = job.keeper(f"{FILES}/run.yaml", [*words.words, *chosen])
    resume = [] if job.run.config.checkpoint.resume == "auto" else _resume_words(job)
    return f"""\
deepspeed --hostfile {FILES}/hostfile --no_ssh --force_multi --node_rank $JOB_COMPLETION_INDEX \\
  --master_addr {name}-0.{name} --master_port {words.port} --log_level error \\
  --module {KEEPER} {shell([plain, program, path, *overrides])}{"".join(resume)} || exit
# All ranks ended well: all steps are done, or they were asked to stop.
[ "$(cat {shell([str(job.latest)])})" = {job.last_checkpoint} ] || exit {STOPPED}"""


def _resume_words(job: Scheduled) -> list[str]:
    """A run that was told not to go on from its own checkpoints must do so when its pods come again."""
    return [f" $([ -e {shell([str(job.latest)])} ] && echo checkpoint.resume=auto)"]


def _files(job: Scheduled, words: argparse.Namespace, name: str) -> str:
    """The ConfigMap's files as YAML."""
    files = {
        "run.yaml": Path(job.path).read_text("utf-8"),
        "hostfile": "".join(
            f"{name}-{index}.{name} slots={job.ranks_per_node}\n" for index in range(job.num_nodes)
        ),
    }
    own = _own_json(job, words)
    if own is not None:
        files["deepspeed.json"] = own.read_text("utf-8")
    return "\n".join(_block(file, text) for file, text in files.items())


def _block(file: str, text: str) -> str:
    """A file as a literal block, which ends at line breaks that a text file may have inside of a line."""
    odd = BLOCK_ENDS.search(text)
    if odd is not None:
        raise RunError(
            f"{file}: has the character U+{ord(odd[0]):04X}, which a manifest cannot carry; take it out"
        )
    indent = "2" if text[:1].isspace() else ""
    return f"{file}: |{indent}\n{_indented(text.rstrip(), 2)}"


def _own_json(job: Scheduled, words: argparse.Namespace) -> Path | None:
    """The DeepSpeed JSON if it is the user's; those that ship with Megaloom are in the image."""
    stated = words.deepspeed_config or job.run.config.deepspeed
    path = find_deepspeed_json(stated)
    return path if path == Path(stated) else None


def _accelerator(job: Scheduled) -> str:
    return "" if job.on_gpus else "\n            - name: DS_ACCELERATOR\n              value: cpu"


def _word(text: str) -> str:
    """A word of the user's as YAML."""
    return yaml.safe_dump(text, width=10**6).removesuffix("\n").removesuffix("\n...")


def _indented(text: str, width: int) -> str:
    return "\n".join(f"{' ' * width}{line}" if line else "" for line in text.split("\n"))
