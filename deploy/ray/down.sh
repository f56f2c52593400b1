#!/usr/bin/env bash
# down.sh CLUSTER.yaml: end an on-premise cluster. `ray down` of the local provider stops the head only, and its workers
# would wait a day for it to come back (RAY_gcs_rpc_server_reconnect_timeout_s).
set -eu
file=$1
python3 - "$file" <<'PYTHON' | while read -r user key address; do
import os, sys, yaml
cluster = yaml.safe_load(open(sys.argv[1]))
auth = cluster["auth"]
for address in cluster["provider"]["worker_ips"]:
    print(auth["ssh_user"], os.path.expanduser(auth["ssh_private_key"]), address)
PYTHON
  ssh -n -i "$key" -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "$user@$address" \
    'bash -lc "source ~/.bashrc; ray stop --grace-period 5" > /dev/null 2>&1' || echo "$address: not stopped" >&2 &
done
wait
ray down -y "$file"
