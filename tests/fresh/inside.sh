#!/bin/sh
# inside.sh ROOT CHECK: make ROOT the root of this mount namespace, and run a check of checks.sh in it.
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

# Nothing of the host's files can be reached after this, and the mounts are those of this root alone.
cd "$root"
pivot_root . mnt
cd /
umount --lazy /mnt

[ ! -d /usr/local/share/ca-certificates ] || ! command -v update-ca-certificates >/dev/null || update-ca-certificates >/dev/null 2>&1
. /fresh/checks.sh
cd /root/kproxy
"check_$check"
# A first process that only waits: the shell collects the orphans of the PID namespace meanwhile.
exit $?
