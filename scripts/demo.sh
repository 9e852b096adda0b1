#!/bin/bash
# The main job on real programs: three HTTP servers and a Redis, each behind an
# address that nothing in the world has; curl, redis-cli and Python as clients
# that know nothing of it. Takes away everything that it makes.
#
#   scripts/demo.sh PILLION
set -euo pipefail

web=10.96.0.12:80
cache=10.96.0.20:6379
shop=10.96.0.30:80

say() { printf '\n\033[1m%s\033[0m\n' "$*" | if [[ -t 1 && -z ${NO_COLOR:-} ]]; then cat; else sed 's/\x1b\[[0-9;]*m//g'; fi; }

# The configuration file: one service, on the cheapest path that can do it.
shop_config() {
	echo "services:"
	echo "  - name: shop"
	echo "    address: $shop"
	echo "    path: auto"
	echo "    endpoints:"
	printf '      - 127.0.0.1:%s\n' "$@"
}

# What the applications do. Runs inside pillion exec, and knows the service
# addresses only.
clients() {
	say "curl http://$web/ twelve times: which server answers?"
	for _ in {1..12}; do curl -sS -m 5 "http://$web/name"; done | sort | uniq -c

	say "redis-cli -h ${cache%:*}"
	redis-cli -h "${cache%:*}" -p "${cache#*:}" set greeting 'hello from redis'
	redis-cli -h "${cache%:*}" -p "${cache#*:}" get greeting

	say "Python sees the address that it asked for, and its own:"
	python3 - "${web%:*}" "${web#*:}" <<-'PYTHON'
		import http.client, sys
		c = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]), timeout=5)
		c.request("GET", "/name")
		print("  getpeername:", c.sock.getpeername())
		print("  getsockname:", c.sock.getsockname())
		print("  answer:     ", c.getresponse().read().decode().strip())
	PYTHON

	say "One server is killed while 60 requests run. How many fail?"
	local failed=0 n
	for n in {1..60}; do
		[[ $n != 20 ]] || kill -9 "$VICTIM"
		curl -sS -m 5 "http://$web/name" >>"$SCRATCH/answers" || failed=$((failed + 1))
	done
	sort "$SCRATCH/answers" | uniq -c
	echo "  failed: $failed of 60"

	say "The same servers are $shop, with path: auto. Which path is that?"
	"$PILLION" explain shop --runtime-dir "$SCRATCH/run"
	say "No hop: the kernel picks. Twelve times, before and after a reload with only one server:"
	for _ in {1..12}; do curl -sS -m 5 "http://$shop/name"; done | sort | uniq -c
	shop_config "$FIRST" >"$SCRATCH/next" && mv "$SCRATCH/next" "$SCRATCH/pillion.yaml"
	"$PILLION" reload --runtime-dir "$SCRATCH/run"
	for _ in {1..12}; do curl -sS -m 5 "http://$shop/name"; done | sort | uniq -c

	say "pillion status"
	"$PILLION" status --runtime-dir "$SCRATCH/run"
	say "A few of the metrics"
	curl -sS --unix-socket "$SCRATCH/run/$NAME.sock" http://pillion/metrics |
		grep -E '^pillion_(connections_total|bytes_total|endpoint_connections|unaccounted)' | head -n 14
	[[ $failed == 0 ]]
}

if [[ ${1:-} == --clients ]]; then
	clients
	exit
fi

PILLION=$(realpath "${1:?usage: demo.sh PILLION}")
SCRATCH=$(mktemp -d)
NAME=demo-$$
pids=()
# shellcheck disable=SC2317 # called by the trap
cleanup() {
	((${#pids[@]} == 0)) || kill -9 "${pids[@]}" 2>/dev/null || true
	wait 2>/dev/null || true
	rm -rf "$SCRATCH"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# Free ports, from the kernel.
free_ports() {
	python3 -c '
import socket, sys
s = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*(x.getsockname()[1] for x in s))' "$1"
}
read -r p1 p2 p3 p4 < <(free_ports 4)

for n in 1 2 3; do
	mkdir -p "$SCRATCH/web$n"
	echo "  server $n" >"$SCRATCH/web$n/name"
	port=p$n
	python3 -m http.server "${!port}" --bind 127.0.0.1 --directory "$SCRATCH/web$n" >/dev/null 2>&1 &
	pids+=($!)
done
VICTIM=${pids[1]}
redis-server --port "$p4" --bind 127.0.0.1 --save '' --dir "$SCRATCH" >/dev/null 2>&1 &
pids+=($!)
disown -a
for port in $p1 $p2 $p3 $p4; do
	for _ in {1..100}; do
		(: >"/dev/tcp/127.0.0.1/$port") 2>/dev/null && break
		sleep 0.05
	done
done

shop_config "$p1" "$p3" >"$SCRATCH/pillion.yaml"
FIRST=$p1

say "Three HTTP servers on 127.0.0.1:$p1,$p2,$p3 are to be $web, a Redis on 127.0.0.1:$p4 is to be $cache"
export PILLION SCRATCH NAME VICTIM FIRST
code=0
"$PILLION" exec --name "$NAME" --runtime-dir "$SCRATCH/run" --config "$SCRATCH/pillion.yaml" \
	--service "$web=127.0.0.1:$p1,127.0.0.1:$p2,127.0.0.1:$p3" \
	--service "$cache=127.0.0.1:$p4" \
	--user root \
	-- "$0" --clients || code=$?

say "pillion flows: what was asked for, what it got, on which path and why"
"$PILLION" flows --runtime-dir "$SCRATCH/run" --limit 12 2>/dev/null
attempts=$("$PILLION" flows --runtime-dir "$SCRATCH/run" 2>/dev/null | grep -c attempts || true)
echo
echo "$attempts connections were tried on the dead server first, and then on another."
exit "$code"
