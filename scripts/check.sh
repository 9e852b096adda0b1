#!/bin/bash
# What can be said about the tree without running it. Every check runs, and the
# exit code tells whether all were satisfied.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

# In a checkout the files are those that git has, or would take; in an unpacked
# archive, all.
files() {
	if git rev-parse --git-dir >/dev/null 2>&1; then
		git ls-files --cached --others --exclude-standard -- "$@"
	else
		local globs=() pattern
		for pattern in "$@"; do
			globs+=(-o -path "./$pattern")
		done
		find . -type f \( "${globs[@]:1}" \) -printf '%P\n'
	fi | sort | while IFS= read -r file; do
		# A file that was removed, but not yet from the index.
		[[ ! -e $file ]] || printf '%s\n' "$file"
	done
}

c_files() {
	files 'bpf/*.c' 'bpf/*.h' | grep -v '^bpf/headers/'
}

go_format() {
	local bad
	bad=$(files '*.go' | xargs gofmt -l)
	[[ -z $bad ]] || {
		printf 'not formatted (make format):\n%s\n' "$bad"
		return 1
	}
}

c_format() {
	c_files | xargs --no-run-if-empty clang-format-19 --dry-run -Werror
}

go_vet() {
	go vet ./...
}

# go build must not need cgo, nor find C that it takes for cgo's.
go_pure() {
	CGO_ENABLED=0 go vet ./cmd/... ./bpf &&
		go mod verify >/dev/null
}

import_rules() {
	go test -count=1 ./tests
}

licences() {
	local file bad=0
	local spdx='SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause'
	while IFS= read -r file; do
		head -n 2 "$file" | grep -qF "$spdx" || {
			echo "$file: its first two lines lack \"$spdx\""
			bad=1
		}
	done < <(c_files)
	for file in LICENSE LICENSES/GPL-2.0-only.txt LICENSES/BSD-2-Clause.txt; do
		[[ -s $file ]] || {
			echo "$file: missing"
			bad=1
		}
	done
	return $bad
}

shell_scripts() {
	{
		files 'scripts/*.sh'
		files 'tests/*.sh'
		echo .ci/run
	} | xargs shellcheck
}

# The objects and bindings are what clang makes of the sources, byte for byte.
generated() {
	local copy file bad=0
	copy=$(mktemp -d)
	cp -r bpf go.mod go.sum "$copy"
	rm -f "$copy"/bpf/*_bpfe[lb].go "$copy"/bpf/*_bpfe[lb].o \
		"$copy"/bpf/*_bpfe[lb]_test.go
	if ! (cd "$copy" && go generate ./bpf) >"$copy/log" 2>&1; then
		cat "$copy/log"
		rm -rf "$copy"
		return 1
	fi
	while IFS= read -r file; do
		cmp -s "$file" "$copy/$file" || {
			echo "$file: not what its source gives (make generate)"
			bad=1
		}
	done < <({ files 'bpf/*_bpfe*' && cd "$copy" && ls bpf/*_bpfe*; } | sort -u)
	((bad == 0)) || clang-19 --version | head -n 1
	rm -rf "$copy"
	return $bad
}

failed=()
for check in go_format c_format go_vet go_pure import_rules licences \
	shell_scripts generated; do
	if "$check"; then
		echo "check: $check: ok"
	else
		echo "check: $check: FAILED"
		failed+=("$check")
	fi
done
if ((${#failed[@]})); then
	echo "check: failed: ${failed[*]}"
	exit 1
fi
