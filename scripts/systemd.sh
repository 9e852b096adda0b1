#!/bin/bash
# Makes the root file system of tests/systemd, once: Debian 12 with systemd and
# little else, in about two minutes and 250 MB, into the cache directory. Prints its
# path; what happens in the meantime goes to standard error.
set -euo pipefail

suite=bookworm
# mirror_of_machine prints where this machine has its packages from, if that is
# Debian 12 itself; else debootstrap has a default.
mirror_of_machine() {
	# shellcheck disable=SC2016
	apt-get indextargets --format '$(CODENAME) $(ORIGIN) $(REPO_URI)' \
		'Created-By: Packages' 2>/dev/null |
		sed -n "s/^$suite Debian //p" | sort -u | sed -n 1p
}
packages=systemd,systemd-sysv,dbus,iproute2

cache=${XDG_CACHE_HOME:-$HOME/.cache}/pillion
# What makes it is its name, so that a change of that is seen.
sum=$(sha256sum "$0" | cut -c 1-12)
root=$cache/systemd-$suite-$sum
mkdir -p "$cache"
exec 9>"$cache/systemd.lock"
flock 9
[[ -d $root ]] || {
	echo "making $root (some minutes)" >&2
	start=$SECONDS
	mirror=$(mirror_of_machine)
	[[ -n $mirror ]] || {
		apt-get update >/dev/null 2>&1 || true # it has no lists yet
		mirror=$(mirror_of_machine)
	}
	work=$(mktemp -d "$cache/systemd.XXXXXX")
	trap 'rm -rf "$work"' EXIT
	debootstrap --variant=minbase --include="$packages" "$suite" "$work/tree" \
		${mirror:+"$mirror"} >"$work/log" 2>&1 9>&- || {
		tail -n 30 "$work/log" >&2
		echo 'systemd.sh: debootstrap failed; its last lines stand above' >&2
		exit 1
	}
	# Nothing here is of this machine, or needs the network.
	rm -rf "$work"/tree/var/{cache,lib}/apt/* "$work/tree/etc/resolv.conf"
	echo pillion-test >"$work/tree/etc/hostname"
	: >"$work/tree/etc/machine-id"
	mv "$work/tree" "$root"
	echo "made in $((SECONDS - start)) s" >&2
}
echo "$root"
