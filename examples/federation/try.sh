#!/usr/bin/env bash
# A real federation of two clients on this machine, over TLS, and a check that its model is the simulation's, bit for bit.
# Usage: try.sh [FOLDER [PORT]]; needs fedfuse[flower] on the PATH and about a minute.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
folder="${1:-$(mktemp -d)}"
port="${2:-9092}"
export OMP_NUM_THREADS=1

fedfuse run "$here/digits.yaml" --out "$folder/simulation"
fedfuse split "$here/digits.yaml" --out "$folder/trial"
fedfuse certs "$folder/certs" --clients client_0,client_1 --host localhost

joins=()
stop() { kill "${joins[@]}" 2>/dev/null || true; }
trap stop EXIT
for name in client_0 client_1; do
  fedfuse join --server "localhost:$port" --name "$name" --data "$folder/trial/$name.npz" --home "$folder/homes/$name" \
    --ca "$folder/certs/$name/ca.pem" --key "$folder/certs/$name/$name.key" --preview --yes >"$folder/$name.log" 2>&1 &
  joins+=($!)
done
fedfuse serve "$folder/trial/federation.yaml" --address "127.0.0.1:$port" --certs "$folder/certs" --out "$folder/run"
fedfuse status "$folder/run"
wait "${joins[@]}"

python - "$folder/simulation/result.json" "$folder/run/result.json" <<'PYTHON'
import json
import sys

simulated, real = (json.load(open(path))["artifact"]["digest"] for path in sys.argv[1:])
print(f"simulation {simulated[:16]}, federation {real[:16]}")
sys.exit(simulated != real)
PYTHON
