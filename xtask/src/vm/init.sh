#!/bin/busybox sh
# The first program of the test machine: makes it look like a small Linux with pure cgroup v2, runs the commands in
# /commands one after the other, says how each ended, and switches the machine off. Lines for the host carry the word
# in /word, which no test knows.

bb=/bin/busybox

if [ "$1" != second ]; then
    # A container gives up its old root with pivot_root, which the kernel refuses on the initial file system. So put a
    # bind mount of the same files over it and go on there.
    $bb mkdir -p /proc /sys /dev /newroot
    $bb mount -o bind / /newroot
    cd /newroot
    $bb mount -o move . /
    exec $bb chroot . /init second
fi

$bb --install -s /bin
# Real programs before busybox's smaller ones.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/ RUST_BACKTRACE=1 TERM=dumb
# Somebody at the keyboard is asked over this line; see keyboard.rs.
export WARMSWAP_KEYBOARD=/dev/ttyS1

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm /run /tmp /var/lib
chmod 1777 /tmp
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=0755 tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null
[ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd
# What systemd does on a real host: children get every controller.
for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do
    echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control
done
while read -r module; do
    insmod "/modules/$module" || echo "cannot load the kernel module $module"
done </modules/order
# A real file system on a block device: memory has no block I/O and, on older kernels, no O_DIRECT.
mkdir -p "$(cat /disk)"
mke2fs /dev/vda >/dev/null 2>&1 && mount -t ext4 /dev/vda "$(cat /disk)" || echo "cannot mount the disk"
ip link set lo up
hostname warmswap-vm
ulimit -n 1048576

word=$(cat /word)
printf '\n%s up %s\n' "$word" "$(uname -r)"
number=0
while read -r command; do
    printf '\n%s begin %s\n' "$word" "$number"
    sh -c "$command" </dev/null 2>&1
    printf '\n%s end %s %s\n' "$word" "$number" "$?"
    number=$((number + 1))
done </commands
printf '\n%s done\n' "$word"
sync
poweroff -f
