#!/usr/bin/env bash
# Train on a spot TPU VM slice until the run has finished: ask for a slice, install on all its hosts, train on all of
# them, and after a preemption or the loss of a host do it again; the run goes on from its last checkpoint.
#
#   gcloud storage cp --recursive corpora/mine gs://BUCKET/corpora/
#   PROJECT=my-project ZONE=us-east5-b BUCKET=my-bucket NAME=first CORPUS=mine \
#     bash configs/launch/tpu_vm.sh configs/tcc_120m.toml [--section.field value ...]
#
# Run it from the top of a clone, where it can stay for as long as the training takes (tmux on a small VM will do): what
# it installs is the last commit. The slice is deleted when the script ends, however it ends.
set -euo pipefail
: "${PROJECT:?the Google Cloud project}" "${ZONE:?a zone with TPUs}" "${BUCKET:?the bucket, without gs://}"
: "${NAME:?a name for the run}" "${CORPUS:?the corpus, a folder of gs://BUCKET/corpora}" "${1:?a TOML file}"
ACCELERATOR=${ACCELERATOR:-v6e-8}    # gcloud compute tpus accelerator-types list --zone=ZONE
RUNTIME=${RUNTIME:-v2-alpha-tpuv6e}  # v5e: v2-alpha-tpuv5-lite, v5p: v2-alpha-tpuv5, v4 and older: tpu-ubuntu2204-base
ROUNDS=${ROUNDS:-50}                 # slices to ask for, one after the other, before giving up

slice=tcc-$NAME
run=gs://$BUCKET/runs/$NAME
where=(--project="$PROJECT" --zone="$ZONE")
# The images' own Python may be older than 3.11, so uv brings one.
install='mkdir tcc && tar -xzf tcc.tar.gz -C tcc && cd tcc && python3 -m pip install --quiet --user uv &&
  python3 -m uv venv --quiet --python 3.11 .venv &&
  python3 -m uv pip install --quiet --python .venv/bin/python -c constraints.txt ".[tpu,gcs]"'
train="cd tcc && $(printf '%q ' .venv/bin/python -m tcc_jax.train "$@" \
  --run.directory "$run" --data.corpus "gs://$BUCKET/corpora/$CORPUS")"

create_slice() {
  gcloud compute tpus queued-resources create "$slice" "${where[@]}" --node-id="$slice" --spot \
    --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" --scopes=cloud-platform
  trap delete_slice EXIT
}

delete_slice() {
  gcloud compute tpus queued-resources delete "$slice" "${where[@]}" --force --quiet || true
  trap - EXIT
}

slice_state() {
  gcloud compute tpus queued-resources describe "$slice" "${where[@]}" --format='value(state.state)'
}

# Wait until the slice is there; not if it was taken away again.
await_slice() {
  local state
  while state=$(slice_state); do
    case $state in
      ACTIVE) return 0 ;;
      FAILED)
        echo "the request for $ACCELERATOR in $ZONE failed: gcloud compute tpus queued-resources describe $slice" >&2
        exit 1
        ;;
      SUSPENDING | SUSPENDED) return 1 ;;
    esac
    sleep 30
  done
  return 1
}

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$slice" "${where[@]}" --worker=all --command="$1"
}

run_state() {
  gcloud storage cat "$run/status.json" 2>/dev/null | sed -n 's/.*"state": *"\([a-z]*\)".*/\1/p'
}

archive=$(mktemp -d)/tcc.tar.gz
git archive --format=tar.gz --output="$archive" HEAD
for ((round = 1; round <= ROUNDS; round++)); do
  echo "round $round: asking for $ACCELERATOR in $ZONE" >&2
  create_slice
  code=0 state=""
  if await_slice; then
    gcloud compute tpus tpu-vm scp "$archive" "$slice:" "${where[@]}" --worker=all && on_all_hosts "$install" || code=$?
    if [ "$code" = 0 ]; then
      on_all_hosts "$train" || code=$?
      state=$(run_state) || true
    fi
  fi
  # Exit code 2 is a mistake in the configuration or the corpus, which another slice would not mend.
  case $code-$state in
    *-finished) exit 0 ;;
    2-* | *-failed)
      echo "the installation or the training failed: see above, and $run/train.log" >&2
      exit 1
      ;;
  esac
  delete_slice
done
echo "not finished after $ROUNDS slices; the same command goes on" >&2
exit 75
