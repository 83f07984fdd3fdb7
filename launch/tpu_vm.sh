#!/usr/bin/env bash
# Runs one training command on every worker of a TPU VM slice, until it is done.
#
#   launch/tpu_vm.sh --tpu NAME --zone ZONE --repo URL --commit SHA --workdir gs://BUCKET/run \
#       -- --config configs/sft.py --config.init_from=gs://BUCKET/4b \
#       --config.data.train="('gs://BUCKET/rows.jsonl',)"
#
#   --tpu NAME        the slice; all of its workers run the command
#   --zone ZONE       where it is
#   --repo URL        git repository that the workers clone
#   --commit SHA      what they check out (the same code after every restart)
#   --workdir DIR     the run's folder: in a bucket (gs://), or on a share that every worker mounts
#   --project NAME    default: gcloud's own
#   --create TYPE     create a slice of this accelerator type if it is missing or was preempted
#   --runtime VERSION image of --create; default v2-alpha-tpuv5-lite
#   --spot            --create asks for a spot slice
#   --queue           --create joins the queue of Google (queued resources), and waits for its turn
#   --before CMD      shell command on every worker before training, for example to mount a share
#   --chip NAME       v4, v5e (default), v5p or v6e: the chip for launch/xla_flags.py
#   --pause SECONDS   time between attempts; default 30
#   -- ...            options of `moss-audio-jax train`
#
# After a preemption the same command continues from the newest checkpoint in --workdir. An attempt
# that ends within five minutes counts as failed; three failures in a row end this script, so that a
# mistake does not restart for ever. Ctrl-C stops the script, but processes on the workers continue
# until the next start, which first asks them to save and exit.
set -euo pipefail

fail() { echo "error: $*" >&2; exit 2; }

tpu='' zone='' repo='' commit='' workdir='' create='' before=':'
project=() spot=() queue='' runtime=v2-alpha-tpuv5-lite chip=v5e pause=30
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  if [ "$1" = --spot ]; then spot=(--spot); shift; continue; fi
  if [ "$1" = --queue ]; then queue=1; shift; continue; fi
  [ $# -ge 2 ] || fail "$1 lacks its value"
  case "$1" in
    --tpu) tpu=$2 ;; --zone) zone=$2 ;; --repo) repo=$2 ;; --commit) commit=$2 ;;
    --workdir) workdir=$2 ;; --project) project=(--project "$2") ;; --create) create=$2 ;;
    --runtime) runtime=$2 ;; --before) before=$2 ;; --chip) chip=$2 ;; --pause) pause=$2 ;;
    *) fail "unknown option $1 (the head of $0 lists them)" ;;
  esac
  shift 2
done
[ "${1:-}" = -- ] || fail "expected -- and the options of moss-audio-jax train"
shift
for name in tpu zone repo commit workdir; do
  [ -n "${!name}" ] || fail "--$name is missing"
done

where=(--zone "$zone" ${project[@]+"${project[@]}"} --quiet)
arguments=$(printf ' %q' --workdir "$workdir" "$@")

# The script that a worker runs. The Python of TPU images is too old, so uv installs a newer one.
# A run that outlived its ssh session still holds the chips, so it is asked to save and exit.
remote=$(cat <<END
set -euo pipefail
pid=/tmp/moss_audio_jax.pid
if [ -f \$pid ] && kill -TERM "\$(cat \$pid)" 2>/dev/null; then
  for _ in \$(seq 120); do kill -0 "\$(cat \$pid)" 2>/dev/null || break; sleep 5; done
  kill -KILL "\$(cat \$pid)" 2>/dev/null || true
fi
$before
[ -d ~/moss_audio_jax/.git ] || git clone --quiet $(printf %q "$repo") ~/moss_audio_jax
cd ~/moss_audio_jax
git fetch --quiet origin
git checkout --quiet --force $(printf %q "$commit")
python3 -m pip install --quiet --user uv
[ -d .venv ] || python3 -m uv venv --quiet --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv/bin/python -e '.[tpu,buckets]'
. .venv/bin/activate
flags=\$(python launch/xla_flags.py $(printf %q "$chip"))
eval "\$flags"
export MOSS_AUDIO_JAX_DISTRIBUTED=1
export MOSS_AUDIO_JAX_HEARTBEAT=60 # seconds until a silent process ends the others
echo \$\$ > \$pid
exec moss-audio-jax train$arguments
END
)

# READY, PREEMPTED, ...; empty if there is no such slice.
state() { gcloud compute tpus tpu-vm describe "$tpu" "${where[@]}" --format='value(state)' || true; }

ensure() {
  local now
  now=$(state)
  if [ "$now" = READY ]; then return 0; fi
  [ -n "$create" ] || { echo "$tpu is '$now', not READY (--create TYPE makes it)" >&2; return 1; }
  if [ -n "$queue" ]; then queued; return; fi
  if [ -n "$now" ]; then gcloud compute tpus tpu-vm delete "$tpu" "${where[@]}" || return 1; fi
  gcloud compute tpus tpu-vm create "$tpu" "${where[@]}" --accelerator-type "$create" \
    --version "$runtime" ${spot[@]+"${spot[@]}"}
}

# Asks again, as a request ends with its slice, and waits.
queued() {
  local of=(gcloud compute tpus queued-resources) now
  if [ -n "$("${of[@]}" describe "$tpu" "${where[@]}" --format='value(state.state)' || true)" ]; then
    "${of[@]}" delete "$tpu" "${where[@]}" --force || return 1
  fi
  "${of[@]}" create "$tpu" --node-id "$tpu" "${where[@]}" --accelerator-type "$create" \
    --runtime-version "$runtime" ${spot[@]+"${spot[@]}"} || return 1
  while true; do
    now=$("${of[@]}" describe "$tpu" "${where[@]}" --format='value(state.state)' || true)
    case "$now" in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDED | '') echo "the request for $tpu is '$now'" >&2; return 1 ;;
    esac
    sleep "$pause"
  done
}

failed=0
while true; do
  SECONDS=0
  if ensure && gcloud compute tpus tpu-vm ssh "$tpu" "${where[@]}" --worker=all \
      --command "$remote"; then
    exit 0
  fi
  if [ "$SECONDS" -lt 300 ]; then failed=$((failed + 1)); else failed=0; fi
  [ "$failed" -lt 3 ] || { echo "error: three short attempts in a row failed" >&2; exit 1; }
  echo "the attempt ended after $SECONDS s; the same command again in $pause s" >&2
  sleep "$pause"
done
