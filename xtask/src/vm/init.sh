#!/bin/busybox sh
# The first process of a guest: makes a machine of the kernel, runs the tests, tells how they ended, turns the power off.
bb=/bin/busybox
$bb mkdir -p /proc /sys /tmp /run /root /var/lib
$bb mount -t proc proc /proc
$bb mount -t sysfs sysfs /sys
$bb mount -t devtmpfs devtmpfs /dev
$bb mkdir -p /dev/pts /dev/shm
$bb mount -t devpts devpts /dev/pts
for folder in /dev/shm /run; do $bb mount -t tmpfs tmpfs $folder; done
# In memory as all of this root; the test programs may lie below it.
$bb chmod 1777 /tmp
$bb ln -s /proc/self/fd /dev/fd
$bb ln -s /run /var/run
$bb mkdir -p /run/netns
$bb mount -t cgroup2 cgroup2 /sys/fs/cgroup
$bb mount -t bpf bpf /sys/fs/bpf
$bb mount -t debugfs debugfs /sys/kernel/debug
$bb mount -t tracefs tracefs /sys/kernel/tracing
$bb mount -t securityfs securityfs /sys/kernel/security
. /guest/environment
$bb hostname guest
# Before any namespace is made: each then has a tunl0, registered before its other devices.
echo 0 > /proc/sys/net/core/fb_tunnels_only_for_init_net
for module in ipip vxlan wireguard veth bridge sch_ingress cls_bpf; do $bb modprobe -q $module; done
ip link set lo up
echo "@@KERNEL $($bb uname -r)"

failed=0
# FOLDER PROGRAM ARGUMENT…: one test program, in the folder where cargo would run it.
run() {
    cd "$1" || { failed=1; return; }
    shift
    "$@" </dev/null
    code=$?
    [ $code = 0 ] || failed=1
    echo "@@RAN rc=$code $*"
}
. /guest/tests
echo "@@EXIT rc=$failed"
$bb poweroff -f
