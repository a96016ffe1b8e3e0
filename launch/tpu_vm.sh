#!/usr/bin/env bash
# One run on Cloud TPU VMs, from the request for a TPU to its deletion:
#
#   launch/tpu_vm.sh --name=r50 --zone=us-central2-b --accelerator=v4-32 --spot \
#       -- --config=configs/r50.py --workdir=gs://BUCKET/r50
#
# Before `--` stand --name, --zone and --accelerator; --runtime (the image of the VMs),
# --keep (do not delete the TPU at the end), --delete (do nothing else), --dry_run (only
# print each gcloud command); anything else, such as --spot, --reserved, --network=NAME
# or --service-account=..., goes to `gcloud compute tpus queued-resources create`.
# After `--` stand the flags of resnet_jax.main.
#
# The same command finds what is there and goes on: a request that waits, a TPU that
# stands, a run that runs. A run that was stopped (exit code 143) or lost its TPU gets
# another, until it ends. Ctrl-C leaves TPU and run as they are.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    echo "error: $*" >&2
    exit 1
}

name='' zone='' accelerator='' runtime=tpu-ubuntu2204-base
keep='' delete='' dry_run=''
pause=${PAUSE:-30} # seconds between two questions
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

[[ $name ]] || fail "which TPU? Give --name=NAME."
[[ $zone ]] || fail "where? Give --zone=us-central2-b, say."
if [[ ! $delete ]]; then
    [[ $accelerator ]] || fail "which TPU? Give --accelerator=v4-32, say."
    (($#)) || fail "train what? Give -- --config=configs/r50.py --workdir=gs://..."
    [[ $keep || " $* " == *" --workdir=gs://"* ]] ||
        fail "the workdir must outlive the TPU: --workdir=gs://BUCKET/NAME (or --keep)."
fi

# Every call of gcloud goes through here.
tpus() {
    if [[ $dry_run ]]; then
        printf '%q ' gcloud compute tpus "$@" "--zone=$zone" --quiet
        echo
    else
        gcloud compute tpus "$@" "--zone=$zone" --quiet
    fi
}

workers() { tpus tpu-vm ssh "$name" --worker="$1" --command="$2"; }

# ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ...; nothing where there is no request.
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

# Returns when the TPU stands.
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
            # What was preempted stays in the queue until it is deleted.
            SUSPENDED) remove ;;
            FAILED) fail "the request failed; see why: gcloud compute tpus" \
                "queued-resources describe $name --zone=$zone; then $0 --delete ..." ;;
            *) sleep "$pause" ;;
        esac
    done
}

# What follows runs on the workers, in ~/resnet_jax. `pid` is that of the shell that
# waits for the run and then writes `code`; its command line tells it from another
# process that got its number after a reboot.
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
# All that an installation needs.
tar -czf "$code_file" --exclude=__pycache__ pyproject.toml requirements.txt README.md \
    LICENSE resnet_jax configs

failures=0
while true; do
    acquire
    # Worker 0 speaks for all: where its run has ended, what others still do is stopped.
    runs=$(workers 0 "$alive && echo runs; true" || true)
    [[ ! $dry_run ]] || echo "$runs"
    if [[ $runs != *runs ]] && ! {
        tpus tpu-vm scp "$code_file" "$name:" --worker=all &&
            workers all "$install" && workers all "$start"
    }; then
        # A TPU that is being taken away may be called active for some minutes.
        ((++failures < 5)) || fail "the workers of $name cannot be set up, as told above."
        sleep "$pause"
        continue
    fi
    failures=0
    echo "Following worker 0; Ctrl-C leaves the run, the same command follows it again."
    workers 0 "$follow" || true
    code=$(workers 0 'cat resnet_jax/code' || true)
    if [[ $dry_run ]]; then
        echo "$code"
        break
    fi
    case $code in
        0) break ;;
        # Told to stop; or no answer, as from a TPU that was taken away.
        143 | '') echo "The run stopped (exit code ${code:-unknown}); it goes on." ;;
        *)
            echo "error: the run failed with exit code $code. The TPU still stands and" \
                "costs; mend it and give the same command, or $0 --name=$name" \
                "--zone=$zone --delete." >&2
            exit "$code"
            ;;
    esac
    sleep "$pause"
done
[[ $keep ]] || remove
