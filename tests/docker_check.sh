#!/usr/bin/env bash
# Build the Dockerfile, chat with the bot in its image, and check what the image contains (`make docker-check`).
#
# This needs root, buildah and debootstrap, but no Docker daemon and no image registry: debootstrap makes a Debian with
# Python under the name of the Dockerfile's base image, and buildah builds on it in a chroot. The build uses the pip
# settings of this machine. It takes some minutes and about 10 GB under $DOCKER_CHECK; the base image is kept.
set -euo pipefail
cd "$(dirname "$0")/.."
work=${DOCKER_CHECK:-/var/tmp/transfertransfo-docker}
base=$(sed -n 's/^FROM //p' Dockerfile)  # python:3.11-slim
mkdir -p "$work"
exec 9> "$work/lock" && flock -n 9 || { echo "another docker-check uses $work; wait for it, or set DOCKER_CHECK"; exit 2; }

buildah() { command buildah --storage-driver vfs --root "$work/storage" --runroot "$work/run" "$@"; }
fail() { echo "docker-check: $*" >&2; exit 1; }
say() { printf '%4d s  %s\n' $SECONDS "$*"; }

if ! buildah inspect --type image "$base" > /dev/null 2>&1; then
    say "making $base, a Debian with Python"
    rm -rf "$work/debian"
    debootstrap --variant=minbase --include=python3,python3-pip,ca-certificates bookworm "$work/debian" > "$work/debootstrap.log" ||
        fail "debootstrap failed with status $?; see $work/debootstrap.log"
    ln -s python3 "$work/debian/usr/bin/python"
    rm -f "$work"/debian/usr/lib/python3.*/EXTERNALLY-MANAGED  # the official image has no such file
    container=$(buildah from scratch)
    buildah add -q "$container" "$work/debian" / > /dev/null
    buildah commit -q --rm "$container" "docker.io/library/$base" > /dev/null
    rm -rf "$work/debian"
fi
python3 -m pip config list | sed -nE "s/^[^=]*\.([a-z-]+)='(.*)'$/\1 = \2/p" | sort -u -t= -k1,1 | sed '1i [global]' > "$work/pip.conf"
volumes=(--volume "$work/pip.conf:/etc/pip.conf:ro")
# Mount the paths that these settings name. If an index is on the disk (file:///opt/pypi/simple), mount its parent folder,
# which holds the files.
for place in $(grep -oE '/[^ ]*[^ /]' "$work/pip.conf" | sed -E 's,^//(.*)/[^/]+$,\1,' | sort -u); do
    if [ -e "$place" ]; then volumes+=(--volume "$place:$place:ro"); fi
done

say "building the image"
buildah bud -q --isolation chroot --layers=false --pull-never "${volumes[@]}" -t transfertransfo . > "$work/build.log" 2>&1 ||
    fail "the build failed; see $work/build.log"
container=$(buildah from --pull-never transfertransfo)
trap 'buildah rm "$container" > /dev/null' EXIT
run() { buildah run --isolation chroot "$container" -- "$@"; }

say "checking what the image contains"
[ "$(run id -u)" -ne 0 ] || fail "the container runs as root"
left=$(run sh -c 'find / -xdev \( -path /proc -o -path /sys \) -prune -o \
    \( -path /app/.git -o -path "/app/.venv*" -o -path "/app/runs/*/checkpoints" -o -name "*.unfinished" \
       -o -path "/root/.cache/*" -o -path "/home/*/.cache/pip*" -o -path "/tmp/?*" \) -print 2> /dev/null | head')
[ -z "$left" ] || fail "the image contains leftovers of its build: $left"
unwritable=$(run sh -c 'test -w /app/runs || echo /app/runs')
[ -z "$unwritable" ] || fail "the container's user cannot write to $unwritable"

say "chatting for three lines"
mapfile -t chat < <(buildah inspect --type image --format '{{range .OCIv1.Config.Cmd}}{{println .}}{{end}}' transfertransfo |
    sed '/^$/d')
printf '%s\n' "hi ! how are you ?" "do you have any pets ?" "what is your favorite food ?" > "$work/said"
run "${chat[@]}" < "$work/said" > "$work/chat.log" 2> "$work/chat.errors" ||
    fail "the chat failed with status $?; see $work/chat.errors"
sed 's/^/        /' "$work/chat.log"
replies=$(sed '0,/^Personality:/d' "$work/chat.log" | grep -c '^[^ ]' || true)
[ "$replies" -eq 3 ] || fail "three lines got $replies replies"
size=$(buildah images --format '{{.Size}}' transfertransfo)
say "done: the container runs as $(run id -un), the image has $size"
