#!/bin/bash
# Builds the parts of Kubernetes that tests need, once, from Go modules, into the
# cache directory. Prints the binary's path; what happens in the meantime goes to
# standard error.
#   apiserver  kube-apiserver and etcd, for tests/kubernetes (the default)
#   kubelet    the kubelet, for tests/kubelet
#   node       these and all the rest of a node, for tests/cluster
set -euo pipefail
cd "$(dirname "$0")/../tests/kubernetes/server"

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
[[ -x $bin ]] || {
	echo "building Kubernetes $version, $part, into $bin (some minutes)" >&2
	mkdir -p "$cache"
	major=${version%%.*} minor=${version#*.} minor=${minor%%.*}
	base=k8s.io/component-base/version
	# Without its version the server says v0.0.0, and refuses much by that.
	CGO_ENABLED=0 nice -n 19 go build -trimpath -buildvcs=false -o "$bin.$$" -ldflags "-s -w \
		-X $base.gitVersion=v$version -X $base.gitMajor=$major -X $base.gitMinor=$minor \
		-X k8s.io/client-go/pkg/version.gitVersion=v$version" "./$part" &
	build=$! start=$SECONDS
	trap 'kill "$build" 2>/dev/null; rm -f "$bin.$$"' EXIT
	while kill -0 "$build" 2>/dev/null; do
		sleep 2
		(((SECONDS - start) % 30 > 1)) || echo "building: $((SECONDS - start)) s" >&2
	done
	wait "$build"
	mv "$bin.$$" "$bin"
	echo "built in $((SECONDS - start)) s" >&2
}
echo "$bin"
