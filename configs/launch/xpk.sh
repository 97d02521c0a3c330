#!/usr/bin/env bash
# Train on TPUs of a GKE cluster through xpk: build and push the image, submit the workload. GKE restarts it after a
# preemption, and the run goes on from its last checkpoint.
#
#   xpk cluster create --cluster=my-cluster --tpu-type=v6e-8 --num-slices=1 --spot --project=... --zone=...
#   gcloud storage cp --recursive corpora/mine gs://BUCKET/corpora/
#   PROJECT=my-project ZONE=us-east5-b CLUSTER=my-cluster IMAGE=... BUCKET=my-bucket NAME=first CORPUS=mine \
#     bash configs/launch/xpk.sh configs/tcc_120m.toml [--section.field value ...]
#
# Run it from the top of a clone. The pods must be allowed to write to the bucket.
set -euo pipefail
: "${PROJECT:?the Google Cloud project}" "${ZONE:?the zone of the cluster}" "${CLUSTER:?a cluster made by xpk}"
: "${IMAGE:?name of an image in a registry that the cluster can read}" "${BUCKET:?the bucket, without gs://}"
: "${NAME:?a name for the run}" "${CORPUS:?the corpus, a folder of gs://BUCKET/corpora}" "${1:?a TOML file}"
TPU_TYPE=${TPU_TYPE:-v6e-8}
RESTARTS=${RESTARTS:-50}

run=gs://$BUCKET/runs/$NAME
train=$(printf '%q ' python -m tcc_jax.train "$@" --run.directory "$run" --data.corpus "gs://$BUCKET/corpora/$CORPUS")
# Kubernetes sends SIGTERM to the shell alone, which hands it on and waits for the training to save. A training that was
# stopped exits with 0, which would end the workload: finished.py makes it 75, with which one that lost a host ends too.
command="trap 'kill -TERM \$child' TERM; $train& child=\$!; wait \$child; wait \$child"
command+=" && python configs/launch/finished.py $run"

docker build --file configs/launch/Dockerfile --tag "$IMAGE" .
docker push "$IMAGE"
xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="tcc-$NAME" \
  --tpu-type="$TPU_TYPE" --num-slices=1 --docker-image="$IMAGE" --command="$command" \
  --max-restarts="$RESTARTS" --restart-on-exit-codes=75 --termination-grace-period-seconds=120
