r"""Starts one run on GKE, as a JobSet; the same command goes on with it.

TPUs: `--slices` slices of `--topology`, one process a host.

python launch/gke/run.py --name=r50 --image=IMAGE \
    --accelerator=tpu-v5-lite-podslice --topology=4x4 --hosts=4 --chips=4 \
    -- --config=configs/r50.py --workdir=gs://BUCKET/r50

GPUs: the same without a topology; one process a host, with all its GPUs.

python launch/gke/run.py --name=r50 --image=IMAGE \
    --accelerator=nvidia-h100-80gb --hosts=2 --chips=8 \
    -- --config=configs/r50.py --workdir=gs://BUCKET/r50

The cluster has JobSet 0.7 or later (https://jobset.sigs.k8s.io); the image is made of
launch/gke/Dockerfile. --dry_run prints the manifest and asks the cluster nothing.
"""

import argparse
import json
import pathlib
import re
import string
import subprocess
import sys

# Python looks beside this script, and not in the root of the project.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from resnet_jax.console import output

TEMPLATE = pathlib.Path(__file__).with_name("jobset.yaml")
GKE = "cloud.google.com"
PORT = 8476


def parse(argv: list[str]) -> argparse.Namespace:
    """The values of a manifest; what stands behind `--` is `.run`."""
    cut = argv.index("--") if "--" in argv else len(argv)
    ours, run = argv[:cut], argv[cut + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--name", required=True, help="of the JobSet")
    parser.add_argument("--image", required=True, help="in a registry GKE can read")
    parser.add_argument("--accelerator", required=True, help="as GKE labels its nodes")
    parser.add_argument("--topology", help="of a TPU slice, 4x4 say; none for GPUs")
    parser.add_argument("--hosts", type=int, required=True, help="of a slice")
    parser.add_argument("--chips", type=int, required=True, help="of a host")
    parser.add_argument("--slices", type=int, default=1, help="of TPUs")
    parser.add_argument("--spot", action="store_true", help="on Spot VMs")
    parser.add_argument(
        "--service_account",
        default="default",
        help="of Kubernetes, that may read and write the workdir's bucket",
    )
    parser.add_argument("--dry_run", action="store_true", help="print the manifest")
    values = parser.parse_args(ours)
    # Names of pods are made from it, and may have 63 characters.
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", values.name):
        parser.error(
            f"--name={values.name}: a letter, then up to 39 of a-z, 0-9 and -."
        )
    if min(values.hosts, values.chips, values.slices) < 1:
        parser.error("--hosts, --chips and --slices are at least 1.")
    if values.slices > 1 and not values.topology:
        parser.error("--slices is for TPUs (--topology); give GPUs more --hosts.")
    if values.slices > 1 and values.hosts == 1:
        parser.error(
            "--slices needs slices of several --hosts: GKE connects no others. Take a"
            " larger --topology."
        )
    if not any(flag.startswith("--config=") for flag in run):
        parser.error("train what? Give -- --config=configs/r50.py --workdir=gs://...")
    if not any(re.match(r"--workdir=(gs|s3)://", flag) for flag in run):
        parser.error("the workdir must outlive the pods: --workdir=gs://BUCKET/NAME.")
    values.run = run
    return values


def manifest(values: argparse.Namespace) -> str:
    """The JobSet as YAML, from jobset.yaml; values go in as JSON, which YAML reads."""
    # Kubernetes replaces $(NAME) in arguments, but not $$(NAME).
    run = [flag.replace("$(", "$$(") for flag in values.run]
    if values.topology:
        connect = ["--distributed"]
        selector = {
            f"{GKE}/gke-tpu-accelerator": values.accelerator,
            f"{GKE}/gke-tpu-topology": values.topology,
        }
        resource = "google.com/tpu"
        # Each slice has a node pool of its own, and a job must not span two.
        apart = {"alpha.jobset.sigs.k8s.io/exclusive-topology": f"{GKE}/gke-nodepool"}
    else:
        # JAX finds out by itself on TPUs; here the first pod's name is known.
        connect = [
            f"--coordinator={values.name}-hosts-0-0.{values.name}:{PORT}",
            f"--num_processes={values.hosts}",
            "--process_id=$(JOB_COMPLETION_INDEX)",
        ]
        selector = {f"{GKE}/gke-accelerator": values.accelerator}
        resource = "nvidia.com/gpu"
        apart = {}
    if values.spot:
        selector[f"{GKE}/gke-spot"] = "true"
    fields = {
        "name": values.name,
        "annotations": apart,
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


def kubectl(*arguments: str, given: str | None = None) -> str:
    """What kubectl printed; exits with its code and message where it fails."""
    done = subprocess.run(
        ["kubectl", *arguments], input=given, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def main(argv: list[str]) -> int:
    """Creates the JobSet, leaves one that runs, replaces one that has ended."""
    values = parse(argv[1:])
    if values.dry_run:
        output.answer(manifest(values).rstrip("\n"))
        return 0
    known = kubectl("get", "jobset", values.name, "--ignore-not-found", "--output=json")
    ended = known and json.loads(known).get("status", {}).get("terminalState")
    if ended:
        output.say(f"{values.name} had ended ({ended}); it goes on in a new JobSet.")
        kubectl("delete", "jobset", values.name, "--cascade=foreground")
    if known and not ended:
        output.say(f"{values.name} is there already, and is left as it is.")
    else:
        kubectl("apply", "--filename=-", given=manifest(values))
    output.say(
        f"State: kubectl get jobset {values.name} --watch\n"
        "Log:   kubectl logs --follow --prefix --tail=-1 --selector="
        f"jobset.sigs.k8s.io/jobset-name={values.name}"
        f" --max-log-requests={values.hosts * values.slices}\n"
        f"Stop:  kubectl delete jobset {values.name} (the same command goes on)"
    )
    return 0


if __name__ == "__main__":
    output.command(main)
