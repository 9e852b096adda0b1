#!/bin/bash
# Builds curl, its test servers and its test programs from Debian's source
# package.
#
#   tests/suites/curl.sh DIR
#
# DIR/build is the tree then. The machine's list of package sources is not
# touched: apt gets one of its own.
set -euo pipefail

dir=$(realpath "$1")
rm -rf "$dir/build" "$dir/apt" "$dir/source"
mkdir -p "$dir/apt/lists/partial" "$dir/apt/archives/partial" "$dir/source"

# The archive that the machine has, but for its sources.
shopt -s nullglob
for file in /etc/apt/sources.list.d/*.sources; do
	sed -E 's/^Types:.*/Types: deb-src/' "$file"
	echo
done >"$dir/apt/src.sources"
for file in /etc/apt/sources.lis[t] /etc/apt/sources.list.d/*.list; do
	sed -nE 's/^deb(-src)? /deb-src /p' "$file"
done >"$dir/apt/src.list"
mkdir "$dir/apt/parts"
mv "$dir/apt/src.sources" "$dir/apt/src.list" "$dir/apt/parts"

fetch() {
	apt-get -qq -o Dir::Etc::sourcelist=- -o Dir::Etc::sourceparts="$dir/apt/parts" \
		-o Dir::State::lists="$dir/apt/lists" -o Dir::Cache="$dir/apt" \
		-o Dir::Cache::archives="$dir/apt/archives" \
		-o APT::Sandbox::User=root -o Acquire::Retries=3 "$@"
}
# A list that fails to load (a foreign source) may not matter.
fetch update || true
cd "$dir/source"
fetch source --download-only curl

# What Debian changes is in how the libraries are built, not in the tests: the
# original is built, which needs no autoconf.
mkdir "$dir/source/build"
tar -xzf curl_*.orig.tar.gz -C "$dir/source/build" --strip-components 1 --no-same-owner
cd "$dir/source/build"
# The one server that listens on loopback whatever it is told.
sed -i 's/^HOST = "localhost"/HOST = "0.0.0.0"/' tests/negtelnetserver.py
./configure --disable-shared --with-openssl --without-libpsl --disable-ldap \
	--disable-dependency-tracking CFLAGS='-O1 -w'
make -j "$(nproc)"
make -j "$(nproc)" -C tests
find . -name '*.o' -delete
mv "$dir/source/build" "$dir/build"
rm -rf "$dir/apt" "$dir/source"
