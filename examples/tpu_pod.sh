#!/usr/bin/env bash
# Trains on all hosts of a TPU pod slice, and goes on where it was when called again.
#   TPU=my-pod ZONE=us-west4-a examples/tpu_pod.sh world gs://my-bucket/world --run.steps 2000
# The first argument is a config, the second a run directory in a bucket, the others are options of
# `lorax-gen train`. Every worker has a checkout in ~/lorax-gen with
#   python3 -m venv .venv && .venv/bin/pip install '.[tpu,gcs]'
set -euo pipefail

: "${TPU:?the name of the TPU VM}" "${ZONE:?its zone}"
config=$1 run_dir=$2
shift 2

# Workers share no disk: what one writes, only a bucket shows to the others.
[[ $run_dir == gs://* ]] || { echo "the run directory must be gs://BUCKET/..." >&2; exit 2; }

# Quoted once more, for the shells of the workers.
arguments=$(printf '%q ' "$config" --run-dir "$run_dir" "$@")

# The same command on every worker, at the same time: each waits for all others to connect, whom
# JAX finds by the TPU's metadata. A preempted slice gets SIGTERM, and then saves and exits with 0;
# after it has been created again, this same script resumes.
gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all \
    --command "cd lorax-gen && .venv/bin/lorax-gen train $arguments"
