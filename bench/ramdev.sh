#!/usr/bin/env bash
# A fast and repeatable disk: ext4 on a loop device on a file in tmpfs, mounted at FOLDER. Real disks of virtual
# machines drift by 4x within minutes; this one reads 6-10 GB/s with O_DIRECT (an NVMe drive on PCIe 4), or what
# `throttle` allows. The file has huge pages and is read directly: a third faster than without, and steadier.
#
#   ramdev.sh up FOLDER SIZE_GB        make and mount it; refuses a folder in use, undoes itself when it fails half-way
#   ramdev.sh throttle FOLDER BYTES    at most BYTES/s are read by the members of its group; 0 lifts it
#   ramdev.sh group FOLDER             print the group's cgroup.procs file: write a process id into it to throttle it
#   ramdev.sh down FOLDER              unmount it and free its memory; may be repeated
#
# Needs root, util-linux and e2fsprogs; `throttle` needs the cgroup-v1 blkio controller.
set -euo pipefail

die() { echo "ramdev: $*" >&2; exit 1; }

[ $# -ge 2 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ "$(id -u)" = 0 ] || die "needs root"
COMMAND=$1
FOLDER=$(realpath -m "$2")
# One device per folder: everything this script touches carries this name.
NAME=sllm-ramdev-$(printf %s "$FOLDER" | cksum | cut -d' ' -f1)
BACKING=/dev/shm/$NAME
IMAGE=$BACKING/image
GROUP=/sys/fs/cgroup/blkio/$NAME

device() { losetup --noheadings --output NAME --associated "$IMAGE" 2>/dev/null | head -1; }

mounted() { [ -n "$(device)" ] && [ "$(findmnt --noheadings --output SOURCE --mountpoint "$FOLDER")" = "$(device)" ]; }

unmount() {
  umount "$FOLDER" 2>/dev/null && return
  sleep 1  # a reader that was just killed may not be gone yet
  umount "$FOLDER" 2>/dev/null && return
  echo "ramdev: $FOLDER is busy: detached, its memory is freed when its last user ends" >&2
  umount --lazy "$FOLDER"
}

leave_group() {
  local pid
  while read -r pid; do echo "$pid" >"$GROUP/../cgroup.procs" || true; done <"$GROUP/cgroup.procs"
  rmdir "$GROUP"
}

down() {
  local dev
  if mounted; then unmount; fi
  dev=$(device)
  if [ -n "$dev" ]; then losetup --detach "$dev"; fi
  if mountpoint -q "$BACKING"; then umount "$BACKING" 2>/dev/null || umount --lazy "$BACKING"; fi
  if [ -d "$BACKING" ]; then rmdir "$BACKING"; fi
  if [ -d "$GROUP" ]; then leave_group; fi
}

up() {
  local size_gb=$1 free_gb dev
  [[ $size_gb =~ ^[1-9][0-9]*$ ]] || die "SIZE_GB must be a whole number"
  [ ! -e "$BACKING" ] || die "it is up already, or was left over: run '$0 down $FOLDER'"
  ! mountpoint -q "$FOLDER" || die "$FOLDER is a mount point already"
  mkdir -p "$FOLDER"
  [ -z "$(ls -A "$FOLDER")" ] || die "$FOLDER is not empty"
  free_gb=$(awk '/^MemAvailable/ { print int($2 / 1048576) }' /proc/meminfo)
  [ "$size_gb" -lt "$free_gb" ] || die "$size_gb GiB wanted, $free_gb GiB of memory available"
  trap 'down || true' EXIT
  trap 'exit 130' INT TERM
  mkdir "$BACKING"
  mount -t tmpfs -o "huge=always,size=${size_gb}G,mode=0700" sllm-ramdev "$BACKING" 2>/dev/null \
    || mount -t tmpfs -o "size=${size_gb}G,mode=0700" sllm-ramdev "$BACKING"
  truncate --size "${size_gb}G" "$IMAGE"
  dev=$(losetup --find --show --direct-io=on "$IMAGE" 2>/dev/null || losetup --find --show "$IMAGE")
  # No journal and no lazy initialisation: nothing may write beside a measurement.
  mkfs.ext4 -q -m 0 -O ^has_journal -E lazy_itable_init=0,nodiscard "$dev"
  mount -o noatime "$dev" "$FOLDER"
  trap - EXIT INT TERM
}

throttle() {
  [[ $1 =~ ^[0-9]+$ ]] || die "BYTES must be a whole number"
  mounted || die "$FOLDER is not up"
  [ -d "${GROUP%/*}" ] || die "there is no cgroup-v1 blkio controller here"
  mkdir -p "$GROUP"
  echo "$(cat "/sys/class/block/$(basename "$(device)")/dev") $1" >"$GROUP/blkio.throttle.read_bps_device"
}

case $COMMAND in
  up) up "${3:-}" ;;
  throttle) throttle "${3:-}" ;;
  group) echo "$GROUP/cgroup.procs" ;;
  down) down ;;
  *) die "unknown command '$COMMAND'" ;;
esac
