//! Counting: CPU seconds, resident memory, load, medians.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

/// A page of metrics takes milliseconds.
const PAGE_TIMEOUT: Duration = Duration::from_secs(10);

/// CPU seconds a process has used, all its threads, user and system. `process` is a pid or `self`.
pub fn cpu_seconds(process: &str) -> Result<f64> {
    let path = format!("/proc/{process}/stat");
    let stat = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    // The name, in parentheses, may hold anything; the fields after it are fixed (proc(5)): state is the third.
    let fields = stat.rsplit_once(')').map(|(_, rest)| rest).ok_or_else(|| anyhow!("{path}: no name"))?;
    let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
    let ticks = |at: usize| -> Result<u64> { Ok(fields.get(at).context("short line")?.parse()?) };
    let ticks = ticks(11)? + ticks(12)?;
    Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// Resident memory in MiB.
pub fn resident_mib(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/status");
    let status = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib / 1024.0)
}

/// Bytes a process has made the disks write so far.
pub fn written_bytes(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/io");
    let io = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    let line = io.lines().find_map(|line| line.strip_prefix("write_bytes:")).context("no write_bytes")?;
    Ok(line.trim().parse()?)
}

/// Load average of the last minute.
pub fn load1() -> Result<f64> {
    let text = std::fs::read_to_string(Path::new("/proc/loadavg"))?;
    Ok(text.split_ascii_whitespace().next().context("empty /proc/loadavg")?.parse()?)
}

/// A counter of `/metrics` at this address, all its label sets together.
pub fn counter(addr: &str, name: &str) -> Result<f64> {
    let mut stream = TcpStream::connect(addr).with_context(|| addr.to_owned())?;
    stream.set_read_timeout(Some(PAGE_TIMEOUT))?;
    write!(stream, "GET /metrics HTTP/1.0\r\nHost: {addr}\r\n\r\n")?;
    let mut page = String::new();
    stream.read_to_string(&mut page).with_context(|| format!("metrics of {addr}"))?;
    sum(&page, name).with_context(|| format!("{addr} has no counter {name}"))
}

fn sum(page: &str, name: &str) -> Option<f64> {
    let values = page.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let value = if rest.starts_with('{') { rest.rsplit_once('}')?.1 } else { rest.strip_prefix(' ')? };
        value.trim().parse::<f64>().ok()
    });
    values.fold(None, |sum, value| Some(sum.unwrap_or(0.0) + value))
}

/// The middle one; of an even number, the mean of the two in the middle.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert!(median(&[]).is_nan());
        assert_eq!(median(&[3.0]), 3.0);
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn a_counter_is_the_sum_of_its_labels() {
        let page = "# TYPE a_total counter\na_total{group=\"1\"} 3\na_total{group=\"{}\"} 4\na_totals 9\nb_total 2\n";
        assert_eq!(
            (sum(page, "a_total"), sum(page, "b_total"), sum(page, "c_total")),
            (Some(7.0), Some(2.0), None)
        );
    }

    #[test]
    fn this_process_uses_cpu_and_memory() {
        assert!(cpu_seconds("self").unwrap() >= 0.0);
        assert!(resident_mib(std::process::id()).unwrap() > 0.5);
        assert!(load1().unwrap() >= 0.0);
    }
}
