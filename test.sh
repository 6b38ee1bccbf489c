#!/usr/bin/env bash
# Runs everything that must pass before a change lands. On a fresh machine with Go it installs what it
# needs and may (Debian, as root), and says what it could not. Every step runs, whatever became of the
# ones before; the exit code is 0 if none failed.
#
#   QCOW2_REQUIRE_QEMU=1   a missing tool fails its step (as in CI) instead of skipping it
#   FUZZTIME=30s           time, or number of inputs, for each fuzz target (default 1000x)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# The newest release that runs with the Go of our machines. `go run` leaves go.mod alone.
staticcheck=honnef.co/go/tools/cmd/staticcheck@v0.8.2

export GOWORK=off # each module is tested as an importer sees it
export LC_ALL=C
PATH=$PATH:/usr/sbin:/sbin # where e2fsprogs lives, for users who are not root

started=$SECONDS
scratch=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$scratch"' EXIT
# A line for each step that ended: its verdict and its name.
verdicts=$scratch/verdicts
: >"$verdicts"

# step NAME COMMAND... runs the command, and prints its verdict and duration.
step() {
	local name=$1 from=$SECONDS verdict=ok
	shift
	echo "=== $name"
	# A subshell with its own set -e: a function called in a condition would ignore failures inside.
	set +e
	(set -e; "$@")
	local code=$?
	set -e
	((code == 0)) || verdict=FAILED
	echo "$verdict $name" >>"$verdicts"
	echo "--- $name: $verdict ($((SECONDS - from)) s)"
}

# skip NAME REASON leaves a step out, or fails it where nothing may be left out.
skip() {
	local verdict=SKIPPED
	[[ ${QCOW2_REQUIRE_QEMU-} != 1 ]] || verdict=FAILED
	echo "=== $1"
	echo "$verdict $1" >>"$verdicts"
	echo "--- $1: $verdict, $2"
}

# names VERDICT prints the steps that ended so, in a line.
names() { sed -nE "s/^($1) //p" "$verdicts" | paste -sd ' ' -; }

# count VERDICT prints how many steps ended so.
count() { grep -c "^$1 " "$verdicts" || true; }

# have COMMAND... tells whether all commands exist.
have() {
	local c
	for c; do command -v "$c" >/dev/null || return 1; done
}

# tools installs what is missing.
tools() {
	local packages=() missing
	have qemu-img qemu-io qemu-nbd || packages+=(qemu-utils)
	have mke2fs e2fsck || packages+=(e2fsprogs)
	have gcc || packages+=(gcc libc6-dev) # the race detector needs cgo
	if ((${#packages[@]} == 0)); then
		echo "nothing to install"
	elif ! have apt-get; then
		echo "cannot install ${packages[*]}: this is not Debian; install them by hand"
	elif ((EUID != 0)); then
		echo "cannot install ${packages[*]}: not root; run: sudo apt-get install ${packages[*]}"
	else
		export DEBIAN_FRONTEND=noninteractive
		apt-get update -qq && apt-get install -qq -y --no-install-recommends "${packages[@]}" ||
			echo "cannot install ${packages[*]}: apt-get failed"
	fi
	for missing in go qemu-img qemu-io mke2fs e2fsck gcc; do
		have "$missing" || echo "MISSING: $missing"
	done
	have go
	go version
	! have qemu-img || qemu-img --version | head -n 1
}

# both COMMAND... runs the command in the root module and in examples.
both() {
	"$@"
	[[ ! -e examples/go.mod ]] || (cd examples && "$@")
}

formatted() {
	local files
	files=$(gofmt -l .)
	[[ -z $files ]] || { echo "not formatted:"; echo "$files"; return 1; }
}

vet() {
	local target
	for target in linux/amd64 darwin/arm64; do
		echo "vet $target"
		GOOS=${target%/*} GOARCH=${target#*/} both go vet ./...
	done
	echo "compile windows/amd64"
	GOOS=windows GOARCH=amd64 compile
}

# compile compiles what users import and run, without its tests, and links nothing.
compile() { both go list -export ./... >/dev/null; }

# oldest compiles with the oldest Go that go.mod allows: a newer one does not notice what the older standard library
# lacks.
oldest() { GOTOOLCHAIN=go1.24.0 compile; }

lint() { both go run "$staticcheck" ./...; }

# fuzz runs each target for as many inputs as FUZZTIME says, from its seeds on: what campaigns on this machine have
# found would take all of so short a time to load. One binary serves all targets of a package.
fuzz() {
	local package target count=0 dir=$scratch/fuzz
	for package in $(grep -l '^func Fuzz' *_test.go internal/*/*_test.go | xargs -n 1 dirname | sort -u); do
		go test -c -fuzz=. -o "$dir/test" "./$package"
		for target in $("$dir/test" -test.list '^Fuzz'); do
			echo "$package $target"
			(cd "$package" && "$dir/test" -test.run '^$' -test.fuzz "^$target\$" -test.fuzztime "${FUZZTIME-1000x}" \
				-test.fuzzminimizetime 10x -test.fuzzcachedir "$dir/cache/$target") | tail -n 20
			count=$((count + 1))
		done
	done
	echo "$count fuzz targets"
	((count > 0))
}

race() { go test -count=1 -race -short -run 'Concurren|Race|Lock' ./...; }

# The arithmetic of 32 bits, on a slice of the tests. What the others look at besides is the same on every machine.
test386() {
	GOARCH=386 go test -count=1 -short \
		-skip 'Crash|Fault|Broken|Parity|Repair|Rebuild|QEMU|Interop|Concurren|Kill|Lies|Shifting|Random|Model|Memory|Steady|Fails|HostFull|Foreign|Sound' ./...
}

examples() { cd examples && go test -count=1 ./...; }

# unit prints one line for each test, skipped ones with their reason, and everything about failures.
unit() { go test -count=1 -v -timeout 12m ./... 2>&1 | awk '!/^=== / && !/^ +--- PASS/ { print; fflush() }'; }

# others are the steps beside the tests proper.
others() {
	step vet vet
	if GOTOOLCHAIN=go1.24.0 go version >/dev/null; then
		step "go 1.24" oldest
	else
		skip "go 1.24" "its toolchain cannot be had here"
	fi
	step staticcheck lint
	step fuzz fuzz
	if have gcc || [[ $(go env GOOS) == darwin ]]; then
		step race race
	else
		skip race "the race detector needs gcc"
	fi
	if [[ $(go env GOOS)/$(go env GOARCH) == linux/amd64 ]]; then
		step "tests on 386" test386
	fi
	step "tests of examples" examples
}

step tools tools
step gofmt formatted
# Compilers and tests keep one core busy each, more or less. The other steps' output follows that of the tests.
others >"$scratch/others" 2>&1 &
step tests unit
wait $! || echo "LOST the other steps" >>"$verdicts"
cat "$scratch/others"

failed=$(names 'FAILED|LOST')
skipped=$(names SKIPPED)
verdict=PASSED
[[ -z $failed ]] || verdict="FAILED ($failed)"
echo "test.sh: $verdict: $(count ok) steps passed, $(count FAILED) failed, $(count SKIPPED) skipped${skipped:+ ($skipped)}, $((SECONDS - started)) s"
[[ -z $failed ]]
