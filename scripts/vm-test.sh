#!/bin/bash
# Runs the tests of packages on Debian's 6.1 kernel, the oldest that Pillion
# supports, in a virtual machine of nothing but pillion, the test binaries and
# busybox.
#
#   scripts/vm-test.sh [PACKAGE...]     as go list takes them; default below
#
# The kernel comes from Debian 12's archive and stays in build/vm. No privilege
# is needed, and nothing of the machine is changed.
#
#   VM_RUN=REGEXP       only these tests (go test's -run)
#   VM_TIMEOUT=SECONDS  for the whole machine; default 900
#   VM_ACCEL=kvm        instead of emulation, where the machine can
set -euo pipefail
cd "$(dirname "$0")/.."

packages=("$@")
((${#packages[@]})) || packages=(./bpf/... ./loader/... ./tests/short)
limit=${VM_TIMEOUT:-900}

# What the kernel would load by itself when a test asks for it, as it does on a
# whole Debian.
modules=(veth dummy tun tcp_diag udp_diag nf_tables iptable_filter
	ip6table_filter)

cache=build/vm
wanted=linux-image-6.1. # of Debian 12

die() {
	echo "vm-test.sh: $*" >&2
	exit 1
}

# newest_kernel names the package that linux-image-amd64 stands for, or the
# newest in the cache when apt knows none.
newest_kernel() {
	local name
	name=$(apt-cache depends linux-image-amd64 2>/dev/null |
		sed -n 's/^ *Depends: \(linux-image-[0-9][^ ]*\)$/\1/p' | head -n 1)
	if [[ $name != "$wanted"* ]]; then
		name=$(find "$cache" -maxdepth 1 -name "$wanted*" -printf '%f\n' |
			sort -V | tail -n 1)
	fi
	[[ -n $name ]] || die "no package $wanted*: needs the archive of Debian 12 (apt-get update)"
	printf '%s\n' "$name"
}

# fetch_kernel leaves the kernel and its modules in $cache/NAME. It is whole or
# not there: the last step is a rename.
fetch_kernel() {
	local name=$1 work
	[[ ! -e $cache/$name ]] || return 0
	echo "vm-test.sh: fetching $name"
	work=$(mktemp -d "$cache/fetch.XXXXXX")
	(
		cd "$work"
		apt-get -qq -o APT::Sandbox::User="$(id -un)" \
			-o Acquire::Retries=3 download "$name"
		dpkg-deb -x ./*.deb tree
	) || {
		rm -rf "$work"
		die "could not fetch $name"
	}
	mkdir "$work/kernel"
	mv "$work"/tree/boot/vmlinuz-* "$work/kernel/vmlinuz"
	mv "$work/tree/lib" "$work/kernel/lib"
	busybox depmod -b "$PWD/$work/kernel" "${name#linux-image-}"
	mv "$work/kernel" "$cache/$name"
	rm -rf "$work"
}

# copy_modules copies the modules that are asked for, with what they need.
copy_modules() {
	local tree=$1 root=$2 version=$3 name path
	for name in "${modules[@]}"; do
		# A module that is not in modules.dep is built in.
		grep -E "/${name//_/[-_]}\.ko:" "$tree/lib/modules/$version/modules.dep" || true
	done | tr -s ': ' '\n' | sort -u | while IFS= read -r path; do
		[[ -z $path ]] || install -D -m 0644 \
			"$tree/lib/modules/$version/$path" \
			"$root/lib/modules/$version/$path"
	done
	cp "$tree/lib/modules/$version"/modules.{order,builtin} \
		"$root/lib/modules/$version"
	busybox depmod -b "$root" "$version"
}

# build_tests compiles the tests of each package into the image, beside their
# test data, and lists them in /tests.
build_tests() {
	local root=$1 package dir list
	list=$(go list -f '{{.ImportPath}} {{.Dir}}' "${packages[@]}")
	while read -r package dir; do
		local relative=${dir#"$PWD"/}
		mkdir -p "$root/src/$relative"
		CGO_ENABLED=0 go test -c -ldflags=-w \
			-o "$root/src/$relative/run.test" "$package" >&2 ||
			die "does not compile: $package"
		if [[ ! -e $root/src/$relative/run.test ]]; then
			continue # no test files
		fi
		if [[ -d $dir/testdata ]]; then
			cp -r "$dir/testdata" "$root/src/$relative"
		fi
		printf '%s %s\n' "$package" "/src/$relative" >>"$root/tests"
	done <<<"$list"
	[[ -s $root/tests ]] || die "no tests in ${packages[*]}"
	CGO_ENABLED=0 go build -buildvcs=false -ldflags=-w \
		-o "$root/bin/pillion" ./cmd/pillion
}

# build_image writes the initial file system, as the kernel takes it, to its
# standard output.
build_image() {
	local root=$1 tree=$2 version=$3
	mkdir -p "$root"/{bin,dev,etc,proc,root,run,src,sys,tmp,var}
	ln -s bin "$root/sbin"
	cp -L "$(command -v busybox)" "$root/bin/busybox"
	busybox --list | while IFS= read -r applet; do
		[[ $applet == busybox ]] || ln -s busybox "$root/bin/$applet"
	done
	echo 'root:x:0:0:root:/root:/bin/sh' >"$root/etc/passwd"
	echo 'nobody:x:65534:65534:nobody:/:/bin/false' >>"$root/etc/passwd"
	printf 'root:x:0:\nnogroup:x:65534:\n' >"$root/etc/group"
	printf '127.0.0.1 localhost\n::1 localhost\n' >"$root/etc/hosts"
	copy_modules "$tree" "$root" "$version"
	build_tests "$root"
	printf -- '-test.v -test.timeout=%ss%s\n' "$((limit - limit / 10))" \
		"${VM_RUN:+ -test.run=$VM_RUN}" >"$root/arguments"
	write_init "$root/init"
	(cd "$root" && find . | cpio --quiet -o -H newc -R 0:0)
}

# write_init writes the first process of the machine. What it says between its
# first and last line is what the user sees; the last one is the exit status.
write_init() {
	cat >"$1" <<'INIT'
#!/bin/sh
export PATH=/bin HOME=/root TMPDIR=/tmp
export PILLION_VM=1 PILLION_REQUIRE_ROOT=1 PILLION=/bin/pillion
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t tmpfs -o mode=0755 run /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
ln -s /proc/self/fd /dev/fd
ulimit -H -n 524288
echo "vm-test: Linux $(uname -r)"
status=0
ip link set lo up || status=1
modprobe veth || status=1
modprobe dummy numdummies=0 || status=1
arguments=$(cat /arguments)
while read -r package dir; do
	cd "$dir" || continue
	start=$(cut -d . -f 1 /proc/uptime)
	# shellcheck disable=SC2086
	if ./run.test $arguments </dev/null; then
		word='ok  '
	else
		word=FAIL
		status=1
	fi
	now=$(cut -d . -f 1 /proc/uptime)
	printf '%s\t%s\t%ds\n' "$word" "$package" $((now - start))
done </tests
sync
echo "vm-test: status $status"
poweroff -f
INIT
	chmod 0755 "$1"
}

# boot runs the image and shows what the machine says from init's first line on.
boot() {
	local kernel=$1 image=$2 log=$3
	timeout --foreground --kill-after=10 "$limit" qemu-system-x86_64 \
		-accel "${VM_ACCEL:-tcg}" -cpu max -smp 2 -m 1024 \
		-nodefaults -no-user-config -no-reboot -display none \
		-serial stdio -kernel "$kernel" -initrd "$image" \
		-append 'console=ttyS0 quiet loglevel=4 panic=-1' \
		</dev/null 2>&1 | tr -d '\r' | tee "$log" |
		sed -u -n '/^vm-test: Linux/,/^vm-test: status/p' |
		sed -u '/^vm-test: status/d'
}

main() {
	mkdir -p "$cache"
	local name work
	name=$(newest_kernel)
	(
		flock 9
		fetch_kernel "$name"
	) 9>"$cache/lock"

	work=$(mktemp -d "$cache/run.XXXXXX")
	# shellcheck disable=SC2064
	trap "rm -rf '$PWD/$work'" EXIT
	build_image "$PWD/$work/root" "$PWD/$cache/$name" \
		"${name#linux-image-}" >"$work/image"

	local code=0
	boot "$cache/$name/vmlinuz" "$work/image" "$work/console" || code=$?
	mv "$work/console" "$cache/console.log"
	if grep -q '^vm-test: status 0$' "$cache/console.log"; then
		return 0
	fi
	if grep -q '^vm-test: status 1$' "$cache/console.log"; then
		die 'some tests failed'
	fi
	tail -n 30 "$cache/console.log" >&2
	((code != 124 && code != 137)) ||
		die "not done after $limit seconds (VM_TIMEOUT); its last lines stand above"
	die 'the machine ended before the tests did; its last lines stand above'
}

main
