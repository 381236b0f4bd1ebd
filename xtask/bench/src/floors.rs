//! What must not get worse: one line per figure that has a bound.

/// A bound on a figure.
#[derive(Debug, Clone, Copy)]
pub enum Bound {
    AtLeast(f64),
    Below(f64),
}

impl Bound {
    pub fn holds(self, value: f64) -> bool {
        match self {
            Bound::AtLeast(floor) => value >= floor,
            Bound::Below(limit) => value < limit,
        }
    }

    pub fn shown(self) -> String {
        match self {
            Bound::AtLeast(floor) => format!("≥ {floor}"),
            Bound::Below(limit) => format!("< {limit}"),
        }
    }
}

/// What the machine itself does at half its speed is enough, where that is less: (suite, row, the machine's row).
const HALF_OF: &[(&str, &str, &str)] =
    &[("data", "put_1gib", "raw_write_fsync"), ("data", "get_1gib", "raw_loopback")];

/// The row of the machine's own limit that a row's floor gives way to.
pub fn limit_of(suite: &str, row: &str) -> Option<&'static str> {
    HALF_OF.iter().find(|(of, name, _)| *of == suite && *name == row).map(|(_, _, limit)| *limit)
}

struct Floor {
    suite: &'static str,
    row: &'static str,
    clients: u32,
    bound: Bound,
}

const fn at_least(suite: &'static str, row: &'static str, clients: u32, floor: f64) -> Floor {
    Floor { suite, row, clients, bound: Bound::AtLeast(floor) }
}

const fn below(suite: &'static str, row: &'static str, clients: u32, limit: f64) -> Floor {
    Floor { suite, row, clients, bound: Bound::Below(limit) }
}

const FLOORS: &[Floor] = &[
    below("start", "up_new", 0, 1.5),
    below("start", "up_existing", 0, 1.0),
    below("start", "idle_cpu_percent", 0, 2.0),
    below("start", "idle_rss_mib", 0, 250.0),
    at_least("meta", "create_empty", 1, 1_000.0),
    at_least("meta", "create_empty", 16, 5_000.0),
    at_least("meta", "mkdir", 1, 300.0),
    at_least("meta", "mkdir", 16, 1_000.0),
    at_least("meta", "stat_by_id", 16, 12_000.0),
    at_least("meta", "list_10000", 1, 200_000.0),
    at_least("crossdir", "mkdir", 64, 4_000.0),
    at_least("crossdir", "mkdir_shared", 64, 2_500.0),
    at_least("crossdir", "rmdir", 64, 3_000.0),
    at_least("crossdir", "move_file", 64, 3_000.0),
    at_least("crossdir", "move_directory", 64, 800.0),
    at_least("data", "put_1gib", 1, 400.0),
    at_least("data", "get_1gib", 1, 700.0),
    at_least("data", "degraded_ratio", 1, 0.6),
    at_least("data", "degraded_ratio_10_4", 1, 0.6),
    at_least("data", "put_1k", 1, 3_000.0),
    at_least("data", "get_1k", 1, 8_000.0),
    below("data", "read_4k_slow_hedged_p99", 1, 15.0),
    at_least("data", "repair", 1, 150.0),
    at_least("replicated", "create_ratio", 1, 0.5),
    at_least("replicated", "create_ratio", 16, 0.5),
    at_least("replicated", "create_ratio", 64, 0.5),
    at_least("replicated", "mkdir_ratio", 1, 0.5),
    at_least("replicated", "mkdir_ratio", 16, 0.5),
    at_least("replicated", "mkdir_ratio", 64, 0.5),
    below("replicated", "create_fsyncs", 64, 0.2),
    below("replicated", "idle_cpu_percent", 0, 3.0),
];

/// CPU seconds for one unit of work.
const CPU_FLOORS: &[Floor] = &[below("data", "put_1gib", 1, 4.0), below("data", "get_1gib", 1, 3.0)];

fn find(floors: &[Floor], suite: &str, row: &str, clients: u32) -> Option<Bound> {
    let found = floors.iter().find(|f| f.suite == suite && f.row == row && f.clients == clients);
    found.map(|floor| floor.bound)
}

/// The bound on a row's median.
pub fn of(suite: &str, row: &str, clients: u32) -> Option<Bound> {
    find(FLOORS, suite, row, clients)
}

/// The bound on a row's CPU per unit.
pub fn of_cpu(suite: &str, row: &str, clients: u32) -> Option<Bound> {
    find(CPU_FLOORS, suite, row, clients)
}
