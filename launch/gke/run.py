r"""Starts one run on GKE as a JobSet; the same command resumes it.

A run on TPUs takes `--slices` slices of `--topology`, with one process per host:

python launch/gke/run.py --name=r50 --image=IMAGE \
    --accelerator=tpu-v5-lite-podslice --topology=4x4 --hosts=4 --chips=4 \
    -- --config=configs/r50.py --workdir=gs://BUCKET/r50

A run on GPUs has no topology. It has one process per host, which takes all its GPUs:

python launch/gke/run.py --name=r50 --image=IMAGE \
    --accelerator=nvidia-h100-80gb --hosts=2 --chips=8 \
    -- --config=configs/r50.py --workdir=gs://BUCKET/r50

The cluster needs JobSet 0.7 or later (https://jobset.sigs.k8s.io), and the image is
built from launch/gke/Dockerfile. --dry_run prints the manifest and calls nothing.
"""

import argparse
import json
import pathlib
import re
import string
import subprocess
import sys

# Python imports from the directory of this script; the package is in the root.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from resnet_jax.console import output

TEMPLATE = pathlib.Path(__file__).with_name("jobset.yaml")
GKE = "cloud.google.com"
PORT = 8476


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the flags of this script, and those of the run into `.run`.

    Args:
      argv: The command line without the name of the script. The flags of
        `resnet_jax.main` follow a `--`.
    """
    cut = argv.index("--") if "--" in argv else len(argv)
    ours, run = argv[:cut], argv[cut + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--name",
        required=True,
        help="The name of the JobSet, up to 40 characters. It is required.",
    )
    parser.add_argument(
        "--image",
        required=True,
        help="The container image, in a registry that GKE can read. It is required.",
    )
    parser.add_argument(
        "--accelerator",
        required=True,
        help="The accelerator by the label of GKE's nodes, such as"
        " tpu-v5-lite-podslice or nvidia-h100-80gb. It is required.",
    )
    parser.add_argument(
        "--topology",
        help="The topology of a TPU slice, such as 4x4. The default is none, for GPUs.",
    )
    parser.add_argument(
        "--hosts",
        type=int,
        required=True,
        help="The number of hosts of a slice, or of GPU nodes. It is required.",
    )
    parser.add_argument(
        "--chips",
        type=int,
        required=True,
        help="The number of TPU chips or GPUs of a host. It is required.",
    )
    parser.add_argument(
        "--slices",
        type=int,
        default=1,
        help="The number of TPU slices. The default is 1.",
    )
    parser.add_argument(
        "--spot",
        action="store_true",
        help="Takes Spot VMs, which may be preempted. It is off by default.",
    )
    parser.add_argument(
        "--service_account",
        default="default",
        help="The Kubernetes service account that may read and write the workdir's"
        " bucket. The default is the account named default.",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="Prints the manifest and starts nothing. It is off by default.",
    )
    values = parser.parse_args(ours)
    # The names of the pods start with it, and may have 63 characters.
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", values.name):
        parser.error(
            f"--name={values.name} is not a letter, followed by up to 39 of a-z, 0-9"
            " and -, the last not a -."
        )
    if min(values.hosts, values.chips, values.slices) < 1:
        parser.error("--hosts, --chips and --slices must be at least 1.")
    if values.slices > 1 and not values.topology:
        parser.error("--slices is for TPUs (--topology). For GPUs give more --hosts.")
    if values.slices > 1 and values.hosts == 1:
        parser.error(
            "--slices needs slices of several --hosts, as GKE connects no others. Take"
            " a larger --topology."
        )
    if not any(flag.startswith("--config=") for flag in run):
        parser.error(
            "The run has no --config. Give its flags after a --, for example --"
            " --config=configs/r50.py --workdir=gs://BUCKET/r50."
        )
    if not any(re.match(r"--workdir=(gs|s3)://", flag) for flag in run):
        parser.error(
            "The workdir must outlive the pods. Give one in a bucket, such as"
            " --workdir=gs://BUCKET/NAME."
        )
    values.run = run
    return values


def manifest(values: argparse.Namespace) -> str:
    """Returns the JobSet as YAML: jobset.yaml with the values filled in as JSON."""
    # Kubernetes replaces $(NAME) in arguments by a variable, and $$(NAME) by $(NAME).
    run = [flag.replace("$(", "$$(") for flag in values.run]
    if values.topology:
        connect = ["--distributed"]
        selector = {
            f"{GKE}/gke-tpu-accelerator": values.accelerator,
            f"{GKE}/gke-tpu-topology": values.topology,
        }
        resource = "google.com/tpu"
        # Each slice is a node pool of its own, and a job must not span two of them.
        annotations = {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": f"{GKE}/gke-nodepool"
        }
    else:
        # On TPUs JAX finds the other processes. On GPUs process 0 is the first pod,
        # whose name is known.
        connect = [
            f"--coordinator={values.name}-hosts-0-0.{values.name}:{PORT}",
            f"--num_processes={values.hosts}",
            "--process_id=$(JOB_COMPLETION_INDEX)",
        ]
        selector = {f"{GKE}/gke-accelerator": values.accelerator}
        resource = "nvidia.com/gpu"
        annotations = {}
    if values.spot:
        selector[f"{GKE}/gke-spot"] = "true"
    fields = {
        "name": values.name,
        "annotations": annotations,
        "slices": values.slices,
        "hosts": values.hosts,
        "service_account": values.service_account,
        "node_selector": selector,
        "image": values.image,
        "arguments": [*connect, *run],
        "limits": {resource: values.chips},
    }
    text = string.Template(TEMPLATE.read_text())
    return text.substitute({name: json.dumps(field) for name, field in fields.items()})


def kubectl(*arguments: str, stdin: str | None = None) -> str:
    """Returns what kubectl prints; exits with its code and message if it fails."""
    done = subprocess.run(
        ["kubectl", *arguments], input=stdin, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def main(argv: list[str]) -> int:
    """Creates the JobSet; leaves one that runs, and replaces one that has ended."""
    values = parse(argv[1:])
    if values.dry_run:
        output.answer(manifest(values).rstrip("\n"))
        return 0
    known = kubectl("get", "jobset", values.name, "--ignore-not-found", "--output=json")
    ended = known and json.loads(known).get("status", {}).get("terminalState")
    if ended:
        output.say(f"{values.name} has ended ({ended}). It resumes in a new JobSet.")
        kubectl("delete", "jobset", values.name, "--cascade=foreground")
    if known and not ended:
        output.say(f"{values.name} is there already and is not changed.")
    else:
        kubectl("apply", "--filename=-", stdin=manifest(values))
    output.say(
        f"State: kubectl get jobset {values.name} --watch\n"
        "Log:   kubectl logs --follow --prefix --tail=-1 --selector="
        f"jobset.sigs.k8s.io/jobset-name={values.name}"
        f" --max-log-requests={values.hosts * values.slices}\n"
        f"Stop:  kubectl delete jobset {values.name} (the same command resumes the run)"
    )
    return 0


if __name__ == "__main__":
    output.command(main)
