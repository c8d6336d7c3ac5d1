#!/usr/bin/env bash
# A few machines that ssh reaches, the first one being this one:
#
#   launch/ssh.sh "HOST [HOST ...]" [CONFIG] [KEY=VALUE ...]
#
# Run it from the checkout, which every machine has at the same path with its packages in .venv (`make .venv/.demo`),
# and with ssh keys in place. One Ray node per machine, one replica per free GPU, or per machine where there is none.
# Only holders of a token made for this run may use the cluster; `ssh` carries it. Whatever was started is ended with
# the script, on Ctrl-C too, which saves first. RUN_DIR=DIR goes on with the run in there, from its newest checkpoint:
# have the configuration write some, say with checkpoint.every_s, as the demo does here.
set -euo pipefail

HOSTS="$1"
CONFIG="${2:-configs/digits-revnet-2cpu.yaml}"
OVERRIDES=("${@:3}")
if [ $# -lt 3 ]; then # the demo, on what these machines have
    OVERRIDES=(devices=auto 'co_tenants=[]' checkpoint.every_s=300)
fi
HEAD_IP="${HEAD_IP:-$(hostname -I | awk '{ print $1 }')}" # on the network that the machines share
PORT="${PORT:-6379}"
RUN_DIR="${RUN_DIR:-runs/ssh-$(date +%Y%m%d-%H%M%S)}"
ADDRESS="$HEAD_IP:$PORT"
PATH="$PWD/.venv/bin:$PATH"

export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
RAY_AUTH_TOKEN="$(python3 -c 'import secrets; print(secrets.token_hex(32))')"
export RAY_AUTH_TOKEN

INPUTS=() # of the ssh of every other machine: its Ray node ends when its input does
end_nodes() {
    for input in "${INPUTS[@]}"; do exec {input}>&-; done
    kill -TERM "$HEAD" 2>/dev/null || true
    wait
}
ray start --head --node-ip-address="$HEAD_IP" --port="$PORT" --include-dashboard=false --block >/dev/null &
HEAD=$!
trap end_nodes EXIT

for host in $HOSTS; do
    # The token goes through the input, where `ps` shows it to nobody.
    exec {input}> >(exec ssh -o BatchMode=yes "$host" "
        cd '$PWD' && PATH=\"\$PWD/.venv/bin:\$PATH\" && read -r RAY_AUTH_TOKEN
        export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
        ray start --address='$ADDRESS' --block >/dev/null & node=\$!
        cat >/dev/null; kill -TERM \$node; wait")
    INPUTS+=("$input")
    echo "$RAY_AUTH_TOKEN" >&"$input"
done

# Wait until every machine has joined, five minutes at most.
for _ in $(seq 60); do
    if python3 - "$ADDRESS" "$((${#INPUTS[@]} + 1))" <<'PYTHON' 2>/dev/null; then break; fi
import sys
import ray
ray.init(sys.argv[1], log_to_driver=False)
sys.exit(sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]))
PYTHON
    sleep 5
done

RESUME=()
if [ -f "$RUN_DIR/config.yaml" ]; then RESUME=(--resume); fi
status=0
revdist launch "$CONFIG" "${OVERRIDES[@]}" --address "$ADDRESS" --run-dir "$RUN_DIR" "${RESUME[@]}" || status=$?
exit "$status"
