# boot.sh ROOTFS FOLDER NAME GPUS: becomes PID 1 of a machine: systemd, on an overlay of ROOTFS.
# machines.py starts it in mount, PID, UTS, IPC and cgroup namespaces of its own; what is mounted here
# is gone with them. The network is the one of the host.
set -e
rootfs=$1 folder=$2 name=$3 gpus=$4 R=$2/root
hostname "$name"
mount -t overlay overlay -o "lowerdir=$rootfs,upperdir=$folder/upper,workdir=$folder/work" "$R"
mount -t proc proc "$R/proc"
# As systemd-nspawn does: the machine's sysctls are the host's, so it must not write them.
for file in sys sysrq-trigger; do
  [[ -e $R/proc/$file ]] || continue
  mount --bind "$R/proc/$file" "$R/proc/$file"
  mount -o remount,bind,ro "$R/proc/$file"
done
mount -t sysfs -o ro sysfs "$R/sys"
mount -t cgroup2 cgroup2 "$R/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$R/dev"
mkdir "$R/dev/shm" "$R/dev/pts"
for device in null zero full random urandom tty; do
  touch "$R/dev/$device"
  mount --bind "/dev/$device" "$R/dev/$device"
done
for ((gpu = 0; gpu < gpus; gpu++)); do mknod -m 666 "$R/dev/nvidia$gpu" c 1 3; done
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$R/dev/pts"
ln -s pts/ptmx "$R/dev/ptmx"
ln -s /proc/self/fd "$R/dev/fd"
ln -s fd/0 "$R/dev/stdin"
ln -s fd/1 "$R/dev/stdout"
ln -s fd/2 "$R/dev/stderr"
mount -t tmpfs tmpfs "$R/dev/shm"
mount -t tmpfs -o mode=755 tmpfs "$R/run"
while read -r mode path; do
  if [[ -d $path ]]; then mkdir -p "$R$path"; else mkdir -p "$R${path%/*}"; touch "$R$path"; fi
  mount --bind "$path" "$R$path"
  mount -o "remount,bind,$mode" "$R$path"
done <"$folder/shared"
mkdir -p "$R/.old"
cd "$R"
pivot_root . .old
umount -l /.old
exec env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin TERM=dumb \
  /lib/systemd/systemd --system --log-target=console --log-level=warning
