#!/usr/bin/env bash
# Runs the separate daemons of a cluster as processes on loopback: on each "host" the five that a machine runs.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: cluster.sh start|stop|status [--hosts 1|3|5] [--data DIR] [--bin DIR] [--port N]
       cluster.sh kill|restart HOST [--data DIR] [--bin DIR] [--port N]

  start         starts hosts host-1, host-2, …: shuckle, shard, crossdir, blockd and janitor on each,
                everything replicated over all of them, and waits until the cluster is whole
  stop          stops them in order; the data stays
  status        says which of them run, and what the cluster says of itself
  kill HOST     kill -9 of a host's processes, as when its power goes
  restart HOST  starts a host's processes that do not run, and waits until the cluster is whole

  --hosts N    how many hosts a new cluster has; an old one keeps its number   [default: 1]
  --data DIR   data, logs and process ids      [default: ./eggs-local, or $EGGS_LOCAL_DATA]
  --bin DIR    where the binaries are          [default: target/release of this checkout, or $EGGS_BIN_DIR]
  --port N     the first host's first port: its shuckle and dashboard. A host takes five ports in a
               row, the next host begins ten further   [default: 5000]
TEXT
}

fail() {
    echo "cluster.sh: $*" >&2
    exit 1
}

misused() {
    echo "cluster.sh: $*" >&2
    usage >&2
    exit 2
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
data=${EGGS_LOCAL_DATA:-eggs-local}
bin=${EGGS_BIN_DIR:-$here/target/release}
port=
hosts=
target=
command=${1:-}
case $command in
start | stop | status) shift ;;
kill | restart)
    [[ ${2:-} == host-[1-9] ]] || misused "$command needs a host: host-1, host-2, …"
    target=$2
    shift 2
    ;;
-h | --help)
    usage
    exit 0
    ;;
*) misused "${command:+unknown command $command; }start, stop, status, kill or restart" ;;
esac
while (($#)); do
    case $1 in
    --hosts | --data | --bin | --port)
        [[ $# -ge 2 ]] || misused "$1 needs a value"
        case $1 in
        --hosts) hosts=$2 ;;
        --data) data=$2 ;;
        --bin) bin=$2 ;;
        --port) port=$2 ;;
        esac
        shift 2
        ;;
    *) misused "unknown option $1" ;;
    esac
done
[[ ${hosts:-1} == [135] ]] || misused "--hosts is 1, 3 or 5"
[[ ${port:-5000} =~ ^[0-9]+$ ]] || misused "--port is a number"

# What a cluster was started with is in the file "cluster": hosts and first port.
held_hosts=1 held_port=5000 held=
if [[ -f $data/cluster ]]; then
    read -r held_hosts held_port <"$data/cluster"
    held=yes
    [[ -z $hosts || $hosts == "$held_hosts" ]] || fail "the cluster in $data has $held_hosts hosts; --hosts $hosts needs another --data"
fi
hosts=${hosts:-$held_hosts}
port=${port:-$held_port}
[[ -z $target || ${target#host-} -le $hosts ]] || fail "no $target: the cluster in $data has $hosts hosts"

address=127.0.0.1
# In the order they are started; the place in it is added to the host's first port.
parts=(shuckle shard crossdir blockd janitor)

# Where a part of host number $2 listens.
place() {
    local i
    for i in "${!parts[@]}"; do
        if [[ ${parts[i]} == "$1" ]]; then
            echo "$address:$((port + 10 * ($2 - 1) + i))"
        fi
    done
}

shuckles() {
    local n list=
    for ((n = 1; n <= hosts; n++)); do list+=,$(place shuckle "$n"); done
    echo "${list#,}"
}

pid_of() { # host-N, part
    local file=$data/run/$1-$2.pid pid
    [[ -f $file ]] || return 1
    pid=$(<"$file")
    # A process of that number may be somebody else's by now.
    [[ $(readlink "/proc/$pid/exe" 2>/dev/null) == */eggs-"$2"* ]] && echo "$pid"
}

launch() { # host-N, part
    local host=$1 part=$2 n=${1#host-} i
    if pid_of "$host" "$part" >/dev/null; then
        return
    fi
    local flags=(--listen "$(place "$part" "$n")" --secret-file "$data/secret")
    case $part in
    shuckle)
        flags+=(--host "$host" --data "$data/$host/$part" --replicas "$hosts")
        if ((hosts > 1)); then flags+=(--peers "$(shuckles)"); fi
        ;;
    janitor) flags+=(--host "$host" --shuckle "$(shuckles)") ;;
    shard | crossdir) flags+=(--host "$host" --data "$data/$host/$part" --shuckle "$(shuckles)") ;;
    blockd)
        flags+=(--host "$host" --shuckle "$(shuckles)")
        # Six for RS(4,2), and some to spare when a host is away.
        local disks=8
        case $hosts in 3) disks=3 ;; 5) disks=2 ;; esac
        for ((i = 0; i < disks; i++)); do flags+=(--disk "$data/$host/disks/$i:FLASH"); done
        ;;
    esac
    "$bin/eggs-$part" "${flags[@]}" >>"$data/log/$host-$part.log" 2>&1 </dev/null &
    echo $! >"$data/run/$host-$part.pid"
}

launch_host() {
    local part
    mkdir -p "$data/$1/disks"
    for part in "${parts[@]}"; do
        launch "$1" "$part"
        # The others read the secret that the first shuckle makes.
        for _ in {1..100}; do
            [[ -s $data/secret || $part != shuckle ]] && break
            sleep 0.05
        done
    done
}

# Until the cluster says that it is whole; a daemon that ends meanwhile is named with its last words.
wait_ready() {
    local host part end=$((SECONDS + 60))
    while ((SECONDS < end)); do
        if "$bin/eggsctl" --shuckle "$(shuckles)" --timeout 2s status --check >"$data/log/status" 2>&1; then
            return
        fi
        for host in "$@"; do
            for part in "${parts[@]}"; do
                if ! pid_of "$host" "$part" >/dev/null; then
                    echo "cluster.sh: $part of $host did not start:" >&2
                    tail -n 3 "$data/log/$host-$part.log" >&2
                    exit 1
                fi
            done
        done
        sleep 0.1
    done
    echo "cluster.sh: not whole after 60 s; see $data/log" >&2
    tail -n 20 "$data/log/status" >&2
    exit 1
}

all_hosts() {
    local n
    for ((n = 1; n <= hosts; n++)); do echo "host-$n"; done
}

need_binaries() {
    local name
    for name in eggs-shuckle eggs-shard eggs-crossdir eggs-blockd eggs-janitor eggsctl; do
        [[ -x $bin/$name ]] || fail "$bin/$name is missing: run cargo build --release --workspace, or give --bin"
    done
}

need_cluster() {
    [[ -n $held ]] || fail "no cluster in $data"
    data=$(cd "$data" && pwd)
}

start() {
    local host
    need_binaries
    mkdir -p "$data"/{log,run}
    data=$(cd "$data" && pwd)
    echo "$hosts $port" >"$data/cluster"
    for host in $(all_hosts); do launch_host "$host"; done
    # shellcheck disable=SC2046
    wait_ready $(all_hosts)
    echo "ready"
    echo "  hosts      $hosts"
    echo "  dashboard  http://$(place shuckle 1)/"
    echo "  data       $data"
    echo "  try        $bin/eggsctl --shuckle $(shuckles) status"
}

# Ends these parts of all hosts together: one after the other would elect leaders to the end.
stop_parts() {
    local host part pid waiting=()
    for host in $(all_hosts); do
        for part in "$@"; do
            if pid=$(pid_of "$host" "$part"); then
                kill -TERM "$pid"
                waiting+=("$host $part $pid")
            else
                rm -f "$data/run/$host-$part.pid"
            fi
        done
    done
    for entry in ${waiting[@]+"${waiting[@]}"}; do
        read -r host part pid <<<"$entry"
        for _ in {1..600}; do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.05
        done
        if kill -0 "$pid" 2>/dev/null; then
            fail "$part of $host (process $pid) does not stop"
        fi
        rm -f "$data/run/$host-$part.pid"
        echo "$host $part stopped"
    done
}

stop() {
    [[ -n $held ]] || return 0
    stop_parts janitor
    stop_parts shard crossdir blockd
    stop_parts shuckle
}

status() {
    local host part pid down=0
    for host in $(all_hosts); do
        for part in "${parts[@]}"; do
            if pid=$(pid_of "$host" "$part"); then
                echo "$host $part runs as process $pid at $(place "$part" "${host#host-}")"
            else
                echo "$host $part does not run"
                down=1
            fi
        done
    done
    if [[ -n $held && -x $bin/eggsctl ]]; then
        echo
        "$bin/eggsctl" --shuckle "$(shuckles)" --timeout 5s status --check || down=1
    fi
    return $down
}

kill_host() {
    local part pid
    need_cluster
    for part in "${parts[@]}"; do
        if pid=$(pid_of "$target" "$part"); then
            kill -KILL "$pid"
            echo "$target $part killed"
        fi
        rm -f "$data/run/$target-$part.pid"
    done
}

restart_host() {
    need_binaries
    need_cluster
    launch_host "$target"
    wait_ready "$target"
    echo "ready"
}

case $command in
kill) kill_host ;;
restart) restart_host ;;
*) "$command" ;;
esac
