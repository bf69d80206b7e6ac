#!/bin/sh
# inside.sh ROOT CHECK: make ROOT the root of this mount namespace, and run a check from checks.sh in it.
set -eu
root=$1
check=$2

hostname fresh
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t tmpfs -o mode=0755 tmpfs "$root/run"
mount -t tmpfs -o mode=0755,nosuid tmpfs "$root/dev"
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=0620,gid=5 devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
for device in null zero full random urandom tty; do
    : >"$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
for number in 0:stdin 1:stdout 2:stderr; do
    ln -s "/proc/self/fd/${number%:*}" "$root/dev/${number#*:}"
done

# From here on, the host's files are unreachable, and only the mounts of this root remain.
cd "$root"
pivot_root . mnt
cd /
umount --lazy /mnt

[ ! -d /usr/local/share/ca-certificates ] || ! command -v update-ca-certificates >/dev/null || update-ca-certificates >/dev/null 2>&1
. /fresh/checks.sh
cd /root/kproxy
"check_$check"
# Keep the shell as PID 1 until the check ends: it reaps orphaned processes.
exit $?
