#!/usr/bin/env bash
# Runs one training on Cloud TPU VMs, from the request for a TPU to its deletion:
#
#   launch/tpu_vm.sh --name=r50 --zone=us-central2-b --accelerator=v4-32 --spot \
#       -- --config=configs/r50.py --workdir=gs://BUCKET/r50
#
# The flags before `--` are:
#   --name=NAME         The name of the TPU. It is required.
#   --zone=ZONE         The zone, such as us-central2-b. It is required.
#   --accelerator=TYPE  The type of the TPU, such as v4-32. It is required.
#   --runtime=IMAGE     The image of the VMs. The default is tpu-ubuntu2204-base.
#   --keep              Keeps the TPU after the run has ended, instead of deleting it.
#   --delete            Only deletes the TPU.
#   --dry_run           Prints each gcloud command and runs none.
# All others, such as --spot, --reserved, --network=NAME or --service-account=..., go to
# `gcloud compute tpus queued-resources create`. The flags after `--` are those of
# resnet_jax.main.
#
# The same command resumes the work: it waits for a request that is queued, uses a TPU
# that exists, and follows a run that is running. A run that was stopped (exit code 143)
# or has lost its TPU is started again, on a new TPU if needed, until it ends. Ctrl-C
# leaves the TPU and the run as they are.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    echo "error: $*" >&2
    exit 1
}

name='' zone='' accelerator='' runtime=tpu-ubuntu2204-base
keep='' delete='' dry_run=''
pause=${PAUSE:-30} # seconds between two calls of gcloud that ask for the state
create=()
while (($#)) && [[ $1 != -- ]]; do
    case $1 in
        --name=*) name=${1#*=} ;;
        --zone=*) zone=${1#*=} ;;
        --accelerator=*) accelerator=${1#*=} ;;
        --runtime=*) runtime=${1#*=} ;;
        --keep) keep=yes ;;
        --delete) delete=yes ;;
        --dry_run) dry_run=yes ;;
        --node-count* | --node-prefix*)
            fail "$1: this script runs on one TPU slice. For several, use" \
                "launch/gke/run.py --slices=N."
            ;;
        *) create+=("$1") ;;
    esac
    shift
done
(($#)) && shift

[[ $name ]] || fail "--name is required, for example --name=r50."
[[ $zone ]] || fail "--zone is required, for example --zone=us-central2-b."
if [[ ! $delete ]]; then
    [[ $accelerator ]] || fail "--accelerator is required, for example --accelerator=v4-32."
    (($#)) || fail "The run has no flags. Give them after a --, for example" \
        "-- --config=configs/r50.py --workdir=gs://BUCKET/r50."
    [[ $keep || " $* " == *" --workdir=gs://"* ]] ||
        fail "The workdir must outlive the TPU. Give --workdir=gs://BUCKET/NAME (or" \
            "--keep)."
fi

# Calls gcloud, or prints the call in a dry run.
tpus() {
    if [[ $dry_run ]]; then
        printf '%q ' gcloud compute tpus "$@" "--zone=$zone" --quiet
        echo
    else
        gcloud compute tpus "$@" "--zone=$zone" --quiet
    fi
}

# Runs a command ($2) on a worker or on all of them ($1).
workers() { tpus tpu-vm ssh "$name" --worker="$1" --command="$2"; }

# Prints the state of the request, such as ACTIVE, WAITING_FOR_RESOURCES or SUSPENDED, or
# nothing if there is no request.
state() {
    local said
    if said=$(tpus queued-resources describe "$name" --format='value(state.state)' 2>&1)
    then
        echo "${said##*$'\n'}"
    elif [[ $said != *NOT_FOUND* && $said != *"not found"* ]]; then
        fail "$said"
    fi
}

remove() { tpus queued-resources delete "$name" --force; }

request() {
    tpus queued-resources create "$name" --node-id="$name" \
        --accelerator-type="$accelerator" --runtime-version="$runtime" \
        ${create[@]+"${create[@]}"}
}

# Requests the TPU if needed, and returns when it exists.
acquire() {
    local now before=none
    while true; do
        now=$(state) || exit 1
        if [[ $dry_run ]]; then
            echo "$now"
            request
            return
        fi
        [[ $now == "$before" ]] || echo "$name: ${now:-no request yet}"
        before=$now
        case $now in
            ACTIVE) return ;;
            '') request ;;
            # A preempted TPU stays in the queue until its request is deleted.
            SUSPENDED) remove ;;
            FAILED) fail "The request failed. The reason: gcloud compute tpus queued-resources" \
                "describe $name --zone=$zone. Then delete it: $0 --delete ..." ;;
            *) sleep "$pause" ;;
        esac
    done
}

# These commands run on the workers, in ~/resnet_jax. The file `pid` has the process id of
# the shell that waits for the run and then writes the exit code to `code`. Its command
# line distinguishes it from a process that got the same id after a reboot.
# shellcheck disable=SC2016
alive='grep -qs resnet_jax.main /proc/$(cat resnet_jax/pid 2>/dev/null)/cmdline'
# shellcheck disable=SC2016
install="$alive && kill -9 -- -\$(cat resnet_jax/pid)"'
set -e
mkdir -p resnet_jax
cd resnet_jax
tar -xzf ../resnet_jax.tar.gz
if [ ! -d .venv ]; then
    python3 -m pip install -q --user uv
    python3 -m uv venv -q --python=3.12 .venv
fi
python3 -m uv pip install -q --python=.venv/bin/python -e ".[cloud,tpu]"'
run='.venv/bin/python -u -m resnet_jax.main --distributed'
(($#)) && run+=$(printf ' %q' "$@")
start="cd resnet_jax
rm -f code
nohup setsid bash -c $(printf %q "$run; echo \$? > code") >> log 2>&1 < /dev/null &
echo \$! > pid"
# shellcheck disable=SC2016
follow='cd resnet_jax; tail -n 20 -F --pid=$(cat pid) log'

if [[ $delete ]]; then
    remove
    exit
fi

directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
code_file=$directory/resnet_jax.tar.gz
# The archive holds everything that an installation needs.
tar -czf "$code_file" --exclude=__pycache__ pyproject.toml requirements.txt README.md \
    LICENSE resnet_jax configs

failures=0
while true; do
    acquire
    # Worker 0 decides for all: if its run has ended, those of the others are stopped.
    runs=$(workers 0 "$alive && echo runs; true" || true)
    [[ ! $dry_run ]] || echo "$runs"
    if [[ $runs != *runs ]] && ! {
        tpus tpu-vm scp "$code_file" "$name:" --worker=all &&
            workers all "$install" && workers all "$start"
    }; then
        # A TPU that is being taken away may still be ACTIVE for some minutes.
        ((++failures < 5)) || fail "The workers of $name cannot be set up; see above."
        sleep "$pause"
        continue
    fi
    failures=0
    echo "Following worker 0. Ctrl-C leaves the run; the same command follows it again."
    workers 0 "$follow" || true
    code=$(workers 0 'cat resnet_jax/code' || true)
    if [[ $dry_run ]]; then
        echo "$code"
        break
    fi
    case $code in
        0) break ;;
        # The run was told to stop, or a TPU that was taken away does not answer.
        143 | '') echo "The run stopped (exit code ${code:-unknown}) and is resumed." ;;
        *)
            echo "error: The run failed with exit code $code. The TPU still exists and" \
                "costs money. Fix the problem and run the same command, or delete the" \
                "TPU: $0 --name=$name --zone=$zone --delete." >&2
            exit "$code"
            ;;
    esac
    sleep "$pause"
done
[[ $keep ]] || remove
