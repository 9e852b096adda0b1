#!/bin/bash
# Runs the tests of packages on a kernel of Debian 12, in a virtual machine of
# nothing but pillion, the test binaries and busybox.
#
#   scripts/vm-test.sh [PACKAGE[:TESTS]...]   packages as go list takes them, each with a
#                                             regexp of tests, or, after a !, of those
#                                             that are left out; default below
#
# The kernel comes from Debian's archive and stays in build/vm. No privilege is
# needed, and nothing of the machine is changed.
#
#   VM_ARCH=arm64       another architecture than amd64, emulated
#   VM_KERNEL=6.12      or 6.1, the oldest that Pillion supports. Default: 6.1 for
#                       amd64, and 6.12 (of backports) for arm64
#   VM_PAGES=16k        for arm64: a kernel with larger pages than 4 KiB
#   VM_CLOCK=host       for arm64: real time, and processors that run side by side
#   VM_RUN=REGEXP       only these tests (go test's -run)
#   VM_TIMEOUT=SECONDS  for the whole machine, in real time; default 900, and 3600
#                       for arm64
#   VM_ACCEL=kvm        instead of emulation, where the machine can
set -euo pipefail
cd "$(dirname "$0")/.."

arch=${VM_ARCH:-amd64}
limit=${VM_TIMEOUT:-900}
# The keeper of survive: crash, as in the Makefile.
entry=-E=github.com/pillion-project/pillion/cmd/pillion/keeper.entry

die() {
	echo "vm-test.sh: $*" >&2
	exit 1
}

case $arch in
amd64)
	kernel=${VM_KERNEL:-6.1}
	packages=(./bpf/... ./loader/... ./tests/short)
	memory=1024 console=ttyS0
	qemu=(qemu-system-x86_64 -cpu max)
	;;
arm64)
	kernel=${VM_KERNEL:-6.12}
	limit=${VM_TIMEOUT:-3600}
	packages=(./cmd/pillion/keeper ./tests/short ./bpf/...
		'./loader/...:!^Test(OpenBeside|Partial|SomeLinks|Orphans|FindPod|ManyRoutes|ManyOnRelay|Publish|KilledPublishing)'
		./redirect/{capture,flow,handler}
		./tests/survive
		'./redirect/l4:^TestUpstreamIsDressed$'
		'./tests/upgrade:^Test(Upgrades|GiverDies|Refusals|NobodyThere|SilentSource|Layouts)')
	left_out='left out here, and run by make test on amd64:
  loader: what crashes at each of many steps, or publishes thousands: minutes at this speed
  redirect/l4: its engine is run here by the kills and take-overs; its own tests take too long
  redirect/upstream, route, telemetry, cmd: Go without the kernel
  upgrade: a taker that is stopped, since limits of seconds are what it is about; what needs python3
  other black-box tests: they need curl, python3, databases and the like'
	memory=3072 console=ttyAMA0
	# With LSE atomics, and without pointer authentication, which is slow to emulate.
	qemu=(qemu-system-aarch64 -machine virt -cpu neoverse-n1)
	# Its time is that of the instructions it has done (2 ns each), and what it waits
	# takes none, so that limits of time hold however slow and busy this machine is.
	# Its two processors take turns then.
	[[ ${VM_CLOCK:-} == host ]] || qemu+=(-icount "shift=1,sleep=off" -rtc clock=vm)
	;;
*) die "VM_ARCH=$arch: amd64 or arm64" ;;
esac
flavour=$arch${VM_PAGES:+-$VM_PAGES}
(($# == 0)) || packages=("$@") left_out=

# What the kernel would load by itself when a test asks for it, as it does on a
# whole Debian.
modules=(veth dummy tun tcp_diag udp_diag nf_tables iptable_filter
	ip6table_filter)

cache=$PWD/build/vm
wanted=linux-image-$kernel. # what the newest of it is called begins so

# own tells whether the machine's own apt has the kernel.
own() { [[ $arch == amd64 && $kernel == 6.1 ]]; }

# cached names the newest kernel in the cache.
cached() {
	find "$cache/" -maxdepth 1 -name "$wanted*-$flavour" -printf '%f\n' |
		sort -V | tail -n 1
}

# newest_kernel names the package that linux-image-FLAVOUR stands for, or the newest in
# the cache. What the machine's own apt does not have is looked for but once.
newest_kernel() {
	local name=
	own || name=$(cached)
	if [[ -z $name ]]; then
		own || apt_lists
		name=$(apt_cache show --no-all-versions linux-image-"$flavour" 2>/dev/null |
			sed -n 's/^Depends: \(linux-image-[0-9][^ ]*\).*$/\1/p' | head -n 1)
	fi
	[[ $name == "$wanted"* ]] || name=$(cached)
	[[ -n $name ]] || die "no package $wanted*: needs the archive of Debian 12 (apt-get update)"
	printf '%s\n' "$name"
}

# apt_lists reads the lists of Debian 12 for the architecture, with backports, into
# a directory of this script, from where the machine has its own packages.
apt_lists() {
	local mirror
	# shellcheck disable=SC2016
	mirror=$(apt-get indextargets --format '$(CODENAME) $(ORIGIN) $(REPO_URI)' \
		'Created-By: Packages' 2>/dev/null |
		sed -n 's/^bookworm Debian //p' | sort -u | sed -n 1p)
	[[ -n $mirror ]] || die "this machine has no packages of Debian 12 (apt-get update)"
	mkdir -p "$cache/apt/lists/partial" "$cache/apt/archives/partial"
	: >"$cache/apt/status"
	printf "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror %s main\n" \
		bookworm bookworm-backports >"$cache/apt/sources.list"
	apt_run apt-get -qq update >&2 || die "could not read the package lists of $arch"
}

# apt_run runs apt with those lists, where the machine's own will not do.
apt_run() {
	local dir=$cache/apt options=()
	own || options=(-o Dir::Etc::SourceList="$dir/sources.list"
		-o Dir::Etc::SourceParts=/dev/null
		-o Dir::State="$dir" -o Dir::State::status="$dir/status"
		-o Dir::Cache="$dir" -o APT::Architecture="$arch"
		-o APT::Architectures="$arch" -o Acquire::Languages=none
		-o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false
		-o APT::Default-Release="bookworm$([[ $kernel == 6.1 ]] || echo -backports)")
	"$1" "${options[@]}" -o APT::Sandbox::User="$(id -un)" \
		-o Acquire::Retries=3 "${@:2}"
}

apt_cache() { apt_run apt-cache "$@"; }

# fetch_kernel leaves the kernel and its modules in $cache/NAME, and a busybox for
# another architecture. It is whole or not there: the last step is a rename.
fetch_kernel() {
	local name=$1 work
	[[ ! -e $cache/$name ]] || return 0
	echo "vm-test.sh: fetching $name"
	work=$(mktemp -d "$cache/fetch.XXXXXX")
	(
		cd "$work"
		wants=("$name")
		[[ $arch == amd64 ]] || wants+=(busybox-static)
		apt_run apt-get -qq download "${wants[@]}"
		for package in ./*.deb; do
			dpkg-deb -x "$package" tree
		done
	) || {
		rm -rf "$work"
		die "could not fetch $name"
	}
	mkdir "$work/kernel"
	mv "$work"/tree/boot/vmlinuz-* "$work/kernel/vmlinuz"
	mv "$work/tree/lib" "$work/kernel/lib"
	[[ $arch == amd64 ]] || mv "$work/tree/bin/busybox" "$work/kernel/busybox"
	busybox depmod -b "$work/kernel" "${name#linux-image-}"
	mv "$work/kernel" "$cache/$name"
	rm -rf "$work"
}

# copy_modules copies the modules that are asked for, with what they need.
copy_modules() {
	local tree=$1 root=$2 version=$3 name path
	for name in "${modules[@]}"; do
		# A module that is not in modules.dep is built in.
		grep -E "/${name//_/[-_]}\.ko(\.xz)?:" "$tree/lib/modules/$version/modules.dep" || true
	done | tr -s ': ' '\n' | sort -u | while IFS= read -r path; do
		[[ -n $path ]] || continue
		install -D -m 0644 "$tree/lib/modules/$version/$path" \
			"$root/lib/modules/$version/$path"
		[[ $path != *.xz ]] || xz -d "$root/lib/modules/$version/$path"
	done
	cp "$tree/lib/modules/$version"/modules.{order,builtin} \
		"$root/lib/modules/$version"
	busybox depmod -b "$root" "$version"
}

# build_tests compiles the tests of each package into the image, beside their
# test data, and lists them in /tests.
build_tests() {
	local root=$1 word package dir only list
	export CGO_ENABLED=0 GOARCH=$arch
	list=$(for word in "${packages[@]}"; do
		only=-test.run=${VM_RUN:-.}
		case $word in
		*:!*) only=-test.skip=${word#*:!} ;;
		*:*) only=-test.run=${word#*:} ;;
		esac
		go list -f "{{.ImportPath}} {{.Dir}} $only" "${word%%:*}" || exit 1
	done)
	while read -r package dir only; do
		local relative=${dir#"$PWD"/}
		mkdir -p "$root/src/$relative"
		go test -c -ldflags=-w \
			-o "$root/src/$relative/run.test" "$package" >&2 ||
			die "does not compile: $package"
		if [[ ! -e $root/src/$relative/run.test ]]; then
			continue # no test files
		fi
		if [[ -d $dir/testdata ]]; then
			cp -r "$dir/testdata" "$root/src/$relative"
		fi
		printf '%s %s %s\n' "$package" "/src/$relative" "$only" >>"$root/tests"
	done <<<"$list"
	[[ -s $root/tests ]] || die "no tests in ${packages[*]}"
	# As the Makefile does it, and then what testutil.Build is asked for.
	build() { go build -buildvcs=false -o "$root/$1" "${@:2}"; }
	wanted_by() { grep -q "^[^ ]*/$1 " "$root/tests"; }
	mkdir "$root/builds"
	build bin/pillion -ldflags="-w $entry" ./cmd/pillion
	! wanted_by tests/survive ||
		build builds/pillion-faulty -tags pillion_fault -ldflags="-w $entry" ./cmd/pillion
	if wanted_by tests/upgrade; then
		build builds/pillion-other -ldflags='-w -X main.version=v0.0.1-other' ./cmd/pillion
		build_layout "$root/builds/pillion-layout"
	fi
	! wanted_by cmd/pillion/keeper ||
		build builds/keeper-worker -ldflags="-w $entry" ./cmd/pillion/keeper/testdata/worker
}

# build_layout builds what TestLayouts has follow the build of this tree, where the
# machine has what that takes; else the test fails.
build_layout() {
	GOARCH='' go test -count=1 -run '^TestLayouts$' ./tests/upgrade \
		-layout-to "$1" -layout-arch "$arch" >&2 ||
		die 'could not build with other maps (needs clang-19 and llvm-strip-19)'
}

# build_image writes the initial file system, as the kernel takes it, to its
# standard output.
build_image() {
	local root=$1 tree=$2 version=$3
	mkdir -p "$root"/{bin,dev,etc,proc,root,run,src,sys,tmp,var}
	ln -s bin "$root/sbin"
	if [[ $arch == amd64 ]]; then
		cp -L "$(command -v busybox)" "$root/bin/busybox"
	else
		cp "$tree/busybox" "$root/bin/busybox"
	fi
	busybox --list | while IFS= read -r applet; do
		[[ $applet == busybox ]] || ln -s busybox "$root/bin/$applet"
	done
	echo 'root:x:0:0:root:/root:/bin/sh' >"$root/etc/passwd"
	echo 'nobody:x:65534:65534:nobody:/:/bin/false' >>"$root/etc/passwd"
	printf 'root:x:0:\nnogroup:x:65534:\n' >"$root/etc/group"
	printf '127.0.0.1 localhost\n::1 localhost\n' >"$root/etc/hosts"
	copy_modules "$tree" "$root" "$version"
	build_tests "$root"
	printf -- '-test.v -test.timeout=%ss\n' "$((limit - limit / 10))" >"$root/arguments"
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
echo "vm-test: Linux $(uname -rm)"
status=0
ip link set lo up || status=1
modprobe veth || status=1
modprobe dummy numdummies=0 || status=1
arguments=$(cat /arguments)
while read -r package dir only; do
	cd "$dir" || continue
	start=$(cut -d . -f 1 /proc/uptime)
	# shellcheck disable=SC2086
	if ./run.test $arguments "$only" </dev/null; then
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
	timeout --foreground --kill-after=10 "$limit" "${qemu[@]}" \
		-accel "${VM_ACCEL:-tcg}" -smp 2 -m "$memory" \
		-nodefaults -no-user-config -no-reboot -display none \
		-serial stdio -kernel "$kernel" -initrd "$image" \
		-append "console=$console quiet loglevel=4 panic=-1" \
		</dev/null 2>&1 | sed -u 's/\r$//' | tee "$log" |
		sed -u -n '/^vm-test: Linux/,/^vm-test: status/p' |
		sed -u '/^vm-test: status/d'
}

# summary says what was run, what skipped itself and why, and what was left out.
summary() {
	awk '
		/^ *[a-z_0-9]+\.go:[0-9]+: / { said = $0; sub(/^[^:]*:[0-9]+: /, "", said) }
		/^--- PASS/ { passed++ }
		/^--- FAIL/ { failed++ }
		/^--- SKIP/ { skipped[++n] = $3 ": " said }
		END {
			printf "tests: %d passed, %d failed, %d skipped\n", passed, failed, n
			for (i = 1; i <= n; i++) print "  skipped " skipped[i]
		}' "$1"
	[[ -z ${left_out:-} ]] || printf '%s\n' "$left_out"
}

main() {
	mkdir -p "$cache"
	local name work
	exec 9>"$cache/lock"
	flock 9
	name=$(newest_kernel)
	fetch_kernel "$name"
	exec 9>&-

	work=$(mktemp -d "$cache/run.XXXXXX")
	# shellcheck disable=SC2064
	trap "rm -rf '$work'" EXIT
	build_image "$work/root" "$cache/$name" \
		"${name#linux-image-}" >"$work/image"

	local code=0
	boot "$cache/$name/vmlinuz" "$work/image" "$work/console" || code=$?
	mv "$work/console" "$cache/console.log"
	summary "$cache/console.log"
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
