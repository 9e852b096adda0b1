#!/bin/bash
# Builds the parts of Kubernetes that tests need, once, from Go modules, into the
# cache directory. Prints the binary's path; what happens in the meantime goes to
# standard error.
#   apiserver  kube-apiserver and etcd, for tests/kubernetes (the default)
#   kubelet    the kubelet, for tests/kubelet
#   node       these and all the rest of a node, for tests/cluster. Where it is
#              built, it stands for the others as well
set -euo pipefail
cd "$(dirname "$0")/../tests/kubernetes/server"

# attempts is how often modules are asked for: the go command does not try again
# by itself.
attempts=3

part=${1:-apiserver}
[[ -f $part/main.go ]] || {
	echo "usage: ${0##*/} [apiserver|kubelet|node]" >&2
	exit 2
}
version=$(sed -n 's,^\tk8s.io/kubernetes v,,p' go.mod)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/pillion
# What the binary is made of is its name, so that a change of version is seen.
sum=$(cat go.mod go.sum ./*/*.go | sha256sum | cut -c 1-12)
bin=$cache/kubernetes-$version-$part-$sum

die() {
	echo "kubernetes.sh: $*; no test was run" >&2
	exit 1
}

# run_slowly runs a command and says every half a minute that it still does.
run_slowly() {
	local what=$1 start=$SECONDS said=0
	shift
	nice -n 19 "$@" 9>&- &
	running=$!
	while kill -0 "$running" 2>/dev/null; do
		sleep 1
		((SECONDS - start < said + 30)) || {
			said=$((SECONDS - start))
			echo "$what: $said s" >&2
		}
	done
	wait "$running"
}

# fetch brings the modules that the part is made of, so that what fails later is
# the compiler. Of hundreds of lines that say so, none is shown if all went well.
fetch() {
	local i
	for ((i = 1; i <= attempts; i++)); do
		# shellcheck disable=SC2016
		! run_slowly 'fetching modules' bash -c 'exec go list -deps "$1" >/dev/null 2>"$2"' \
			bash "./$part" "$bin.log" || return 0
		grep -v '^go: downloading' "$bin.log" >&2 || true
		echo "attempt $i of $attempts failed" >&2
		((i == attempts)) || sleep $((5 * i))
	done
	die "could not fetch the modules of Kubernetes $version"
}

build() {
	local start=$SECONDS major minor base=k8s.io/component-base/version
	echo "building Kubernetes $version, $part, into $bin (some minutes)" >&2
	running=
	export CGO_ENABLED=0
	trap 'kill $running 2>/dev/null || true; rm -f "$bin.new" "$bin.log"' EXIT
	fetch
	major=${version%%.*} minor=${version#*.} minor=${minor%%.*}
	# Without its version the server says v0.0.0, and refuses much by that.
	run_slowly building go build -trimpath -buildvcs=false -o "$bin.new" -ldflags "-s -w \
		-X $base.gitVersion=v$version -X $base.gitMajor=$major -X $base.gitMinor=$minor \
		-X k8s.io/client-go/pkg/version.gitVersion=v$version" "./$part" ||
		die "could not build Kubernetes $version"
	mv "$bin.new" "$bin"
	echo "built in $((SECONDS - start)) s" >&2
}

mkdir -p "$cache"
exec 9>"$cache/kubernetes.lock"
flock 9
whole=$cache/kubernetes-$version-node-$sum
[[ ! -x $whole ]] || bin=$whole
[[ -x $bin ]] || build
echo "$bin"
