#!/usr/bin/env bash
# Runs the separate daemons of a cluster as processes on loopback.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: cluster.sh start|stop|status [--data DIR] [--bin DIR] [--port N]

  start    starts shuckle, two shard daemons, the coordinator and two block
           service daemons (four disks each), and waits until they serve
  stop     stops them in order; the data stays
  status   says which of them run

  --data DIR   data, logs and process ids   [default: ./eggs-local, or $EGGS_LOCAL_DATA]
  --bin DIR    where the binaries are       [default: target/release of this checkout, or $EGGS_BIN_DIR]
  --port N     shuckle's port; the next five are the other daemons'   [default: 5000]
TEXT
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
data=${EGGS_LOCAL_DATA:-eggs-local}
bin=${EGGS_BIN_DIR:-$here/target/release}
port=5000
command=${1:-}
case $command in
start | stop | status) shift ;;
-h | --help)
    usage
    exit 0
    ;;
*)
    usage >&2
    exit 2
    ;;
esac
while (($#)); do
    case $1 in
    --data | --bin | --port)
        [[ $# -ge 2 ]] || { echo "cluster.sh: $1 needs a value" >&2; exit 2; }
        case $1 in
        --data) data=$2 ;;
        --bin) bin=$2 ;;
        --port) port=$2 ;;
        esac
        shift 2
        ;;
    *)
        echo "cluster.sh: unknown option $1" >&2
        usage >&2
        exit 2
        ;;
    esac
done

# In the order they are started; stopped in reverse.
daemons=(shuckle shard-a shard-b crossdir blockd-a blockd-b)

pid_of() {
    local file=$data/run/$1.pid pid
    [[ -f $file ]] || return 1
    pid=$(<"$file")
    # A process of that number may be somebody else's by now.
    [[ $(readlink "/proc/$pid/exe" 2>/dev/null) == */eggs-"${1%-*}"* ]] && echo "$pid"
}

launch() {
    local name=$1
    shift
    if pid_of "$name" >/dev/null; then
        echo "$name runs already"
        return
    fi
    "$@" >>"$data/log/$name.log" 2>&1 </dev/null &
    echo $! >"$data/run/$name.pid"
}

disks() {
    local n
    for n in 0 1 2 3; do
        printf -- '--disk\n%s/disks/%s%s:FLASH\n' "$data" "$1" "$n"
    done
}

# Until shuckle knows of all of it; a daemon that ends meanwhile is named with its last words.
wait_ready() {
    local tries name
    for ((tries = 0; tries < 300; tries++)); do
        "$bin/eggsctl" --shuckle "127.0.0.1:$port" --timeout 2s status --check >/dev/null 2>&1 && return
        for name in "${daemons[@]}"; do
            if ! pid_of "$name" >/dev/null; then
                echo "cluster.sh: $name did not start:" >&2
                tail -n 3 "$data/log/$name.log" >&2
                exit 1
            fi
        done
        sleep 0.1
    done
    echo "cluster.sh: not ready after 30 s; see $data/log" >&2
    exit 1
}

start() {
    local name address=127.0.0.1
    for name in eggs-shuckle eggs-shard eggs-crossdir eggs-blockd eggsctl; do
        [[ -x $bin/$name ]] || {
            echo "cluster.sh: $bin/$name is missing: run cargo build --release --workspace, or give --bin" >&2
            exit 1
        }
    done
    mkdir -p "$data"/{log,run,disks}
    data=$(cd "$data" && pwd)
    local common=(--shuckle "$address:$port" --secret-file "$data/secret")
    launch shuckle "$bin/eggs-shuckle" --listen "$address:$port" --data "$data/shuckle" --secret-file "$data/secret"
    # The others read the secret that shuckle makes.
    for _ in {1..100}; do [[ -s $data/secret ]] && break; sleep 0.05; done
    launch shard-a "$bin/eggs-shard" "${common[@]}" --listen "$address:$((port + 1))" --data "$data/shard-a" --shards 0..127
    launch shard-b "$bin/eggs-shard" "${common[@]}" --listen "$address:$((port + 2))" --data "$data/shard-b" --shards 128..255
    launch crossdir "$bin/eggs-crossdir" "${common[@]}" --listen "$address:$((port + 3))" --data "$data/crossdir"
    local disk_args
    mapfile -t disk_args < <(disks a)
    launch blockd-a "$bin/eggs-blockd" "${common[@]}" --listen "$address:$((port + 4))" --failure-domain host-a "${disk_args[@]}"
    mapfile -t disk_args < <(disks b)
    launch blockd-b "$bin/eggs-blockd" "${common[@]}" --listen "$address:$((port + 5))" --failure-domain host-b "${disk_args[@]}"
    wait_ready
    echo "ready"
    echo "  dashboard  http://$address:$port/"
    echo "  data       $data"
    echo "  try        $bin/eggsctl --shuckle $address:$port status"
}

stop() {
    local i name pid
    for ((i = ${#daemons[@]} - 1; i >= 0; i--)); do
        name=${daemons[i]}
        if ! pid=$(pid_of "$name"); then
            rm -f "$data/run/$name.pid"
            continue
        fi
        kill -TERM "$pid"
        for _ in {1..300}; do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.1
        done
        if kill -0 "$pid" 2>/dev/null; then
            echo "cluster.sh: $name (process $pid) does not stop" >&2
            exit 1
        fi
        rm -f "$data/run/$name.pid"
        echo "$name stopped"
    done
}

status() {
    local name pid down=0
    for name in "${daemons[@]}"; do
        if pid=$(pid_of "$name"); then
            echo "$name runs as process $pid"
        else
            echo "$name does not run"
            down=1
        fi
    done
    return $down
}

"$command"
